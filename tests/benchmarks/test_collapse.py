"""Results that are kept belong to the settings of now."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import collapse
from benchmarks.collapse import CURES, Job, check_settings
from xlstm_rl.configs import ConfigError


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A run whose result is there."""
    trained = SimpleNamespace(scores=[SimpleNamespace(mean_return=1.0)], rows=[])
    monkeypatch.setattr("xlstm_rl.runs.train.train", lambda config, folder: trained)
    monkeypatch.setattr(collapse, "RESULTS", tmp_path)
    job = Job("floor", 1)
    job.path.write_text(json.dumps(collapse.run(job)), encoding="utf-8")
    return job


def test_result_is_taken_for_the_settings_that_it_was_made_with(job: Job) -> None:
    check_settings([job, Job("stock", 0)])


def test_result_of_other_settings_is_refused(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CURES, "floor", ("ppo.advantage_floor=0.2", "ppo.grad_spike_factor=null"))
    with pytest.raises(ConfigError, match="floor-1.json was made with other settings; remove it"):
        check_settings([job])


def test_results_of_former_versions_which_name_no_settings_are_taken(job: Job) -> None:
    result = json.loads(job.path.read_text(encoding="utf-8"))
    del result["config"]
    job.path.write_text(json.dumps(result), encoding="utf-8")
    check_settings([job])
