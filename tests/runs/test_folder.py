"""Where a run lies."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from xlstm_rl.configs import ConfigError, load
from xlstm_rl.runs.folder import RunFolder, default_run_path


def test_default_name_tells_preset_and_seed() -> None:
    path = default_run_path("my.envs:Ns/Env-v0", 3)
    assert path.parent == Path("runs")
    assert path.name.startswith("my.envs-Ns-Env-v0-seed3-2")


def test_numbered_folders_of_runs_started_together_differ(tmp_path: Path) -> None:
    config = load("tmaze")
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: RunFolder.create(tmp_path / "run", config, numbered=True), range(8)))
    names = sorted(folder.path.name for folder in folders)
    assert names == ["run", *(f"run-{number}" for number in range(2, 9))]


def test_of_runs_started_together_in_one_folder_only_one_gets_it(tmp_path: Path) -> None:
    config = load("tmaze")

    def create(_: int) -> bool:
        try:
            return RunFolder.create(tmp_path / "run", config).config.is_file()
        except ConfigError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(create, range(8))) == 1


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path, load("tmaze")).config.is_file()


@pytest.mark.parametrize("numbered", [False, True])
def test_folder_that_cannot_be_written_is_refused(numbered: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"file/run cannot be written: Not a directory; choose another --run-dir"):
        RunFolder.create(tmp_path / "file" / "run", load("tmaze"), numbered=numbered)


def test_configuration_that_yaml_cannot_hold_claims_no_folder(tmp_path: Path) -> None:
    config = load("tmaze")
    kwargs = {**config.env.kwargs, "corridor_length": np.int64(5)}
    config = dataclasses.replace(config, env=dataclasses.replace(config.env, kwargs=kwargs))
    with pytest.raises(ConfigError, match="cannot be written as YAML"):
        RunFolder.create(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_folder_with_too_long_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: File name too long"):
        RunFolder.create(tmp_path / ("x" * 300), load("tmaze"))
