"""Looking inside a trained agent: one episode with everything the memory did, as a picture and a video."""

from xlstm_rl.inspection.episode import Episode, record_episode
from xlstm_rl.inspection.picture import draw_episode
from xlstm_rl.inspection.probe import Probe, draw_probes, probe_memory
from xlstm_rl.inspection.reads import read_weights
from xlstm_rl.inspection.video import write_gif

__all__ = [
    "Episode",
    "Probe",
    "draw_episode",
    "draw_probes",
    "probe_memory",
    "read_weights",
    "record_episode",
    "write_gif",
]
