"""`xlstm-rl probe`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from xlstm_rl.cli import main
from xlstm_rl.configs import ConfigError, load
from xlstm_rl.inspection.probe import OBSERVATION
from xlstm_rl.runs.open import probe_run
from xlstm_rl.runs.train import train

SHORT = ["ppo.n_steps=16", "ppo.batch_size=64", "memory.hidden_size=16", "eval.every_steps=null", "eval.n_episodes=4"]


def test_runs_are_probed_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {name: tmp_path / name for name in ("lstm", "none")}
    for name, folder in folders.items():
        train(load("CueRecall-v0", [*SHORT, f"memory.name={name}", "total_steps=256"]), folder)
    code = main(["probe", str(folders["lstm"]), "--beside", str(folders["none"]), "--episodes", "64"])
    told = " ".join(capsys.readouterr().out.split())
    assert code == 0 and "the first symbol" in told and "chance" in told
    assert (folders["lstm"] / "probe.png").stat().st_size > 0 and not (folders["none"] / "probe.png").exists()
    with_memory, without = probe_run(folders["lstm"], beside=folders["none"], episodes=64)
    assert set(with_memory.accuracy) == {"memory", OBSERVATION} and set(without.accuracy) == {OBSERVATION}
    # the cue is on the screen at first, and the cells of an LSTM hold it for a step, trained or not
    assert with_memory.accuracy["memory"][:2].tolist() == [1.0, 1.0]
    np.testing.assert_allclose(without.accuracy[OBSERVATION][1:], without.chance[1:], atol=0.35)


def test_run_of_a_task_without_hidden_variable_is_refused(tmp_path: Path) -> None:
    train(load("CartPole-v1", [*SHORT, "total_steps=256"]), tmp_path / "run")
    with pytest.raises(ConfigError, match="run cannot be probed: the task names no hidden variable"):
        probe_run(tmp_path / "run")
