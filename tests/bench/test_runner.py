"""Runs that break, are killed or are told to stop."""

from __future__ import annotations

import dataclasses
import errno
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from tests.bench.small_bench import BREAKING, SMALL, write_breaking_envs
from xlstm_rl.bench.plan import PlannedRun, plan_runs
from xlstm_rl.bench.results import Record, gather, read_records
from xlstm_rl.bench.runner import Outcome, check_settings, run_all
from xlstm_rl.bench.spec import read_spec
from xlstm_rl.configs import ConfigError

ROOT = Path(__file__).parents[2]


def run_some(out: Path, text: str, only: list[str], workers: int = 2) -> tuple[Outcome, list[PlannedRun], str]:
    spec = read_spec(text, "x")
    runs, said = plan_runs(spec, out, only), io.StringIO()
    outcome = run_all(runs, spec, workers=workers, hours=None, console=Console(file=said, width=200))
    return outcome, runs, said.getvalue()


def read(run: PlannedRun) -> Record:
    record = read_records([run])[run.name]
    return dataclasses.replace(record, cpu_minutes=0.0)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome, str]:
    """A benchmark of which one run raised, one was killed and one went well, and then all again, mended."""
    folder = tmp_path_factory.mktemp("broken")
    trigger = write_breaking_envs(folder)
    trigger.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        text = BREAKING.replace("tasks:\n", "tasks:\n  cue-recall: {}\n")
        first = run_some(folder / "out", text, ["*/lstm/0"])
        reasons = gather("x", read_spec(text, "x"), first[1]).failures
        trigger.unlink()
        second = run_some(folder / "out", text, ["*/lstm/0"])
        run_some(folder / "whole", text, ["dying/lstm/0"])
    assert not second[0].failed and not second[0].left
    (folder / "reasons").write_text("\n====\n".join(f"{k}\n{v}" for k, v in sorted(reasons.items())), encoding="utf-8")
    return folder, first[0], first[2]


def test_run_that_breaks_does_not_stop_the_others(broken: tuple[Path, Outcome, str]) -> None:
    folder, outcome, said = broken
    assert sorted(run.name for run in outcome.failed) == ["dying/lstm/0", "raising/lstm/0"]
    assert "cue-recall/lstm/0 done" in said and not outcome.left


def test_traceback_or_signal_is_recorded(broken: tuple[Path, Outcome, str]) -> None:
    dying, raising = (broken[0] / "reasons").read_text(encoding="utf-8").split("====")
    assert "killed by SIGKILL" in dying
    assert "Traceback" in raising and "the simulator has no licence" in raising


def test_killed_run_becomes_what_it_would_have_been(broken: tuple[Path, Outcome, str]) -> None:
    # with steps 128 checkpointed and the environment breaking in step 131, it was resumed and not started anew
    pair = [plan_runs(read_spec(BREAKING, "x"), broken[0] / name, ["dying/lstm/0"])[0] for name in ("out", "whole")]
    assert read(pair[0]) == read(pair[1])
    assert not pair[0].failure.exists()


def test_unfinished_run_does_not_go_on_with_other_ways_to_end_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_breaking_envs(tmp_path).touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    outcome, runs, _ = run_some(tmp_path / "out", BREAKING, ["raising/lstm/0"])
    assert outcome.failed == runs
    check_settings(runs, read_spec(BREAKING, "x"))
    changed = {
        "stop_score": BREAKING + "stop_score: 0.9\n",
        "stop_evaluations": BREAKING + "stop_evaluations: 2\n",
    }
    for text in changed.values():
        with pytest.raises(ConfigError, match="raising/lstm/0 in .* was made with other settings"):
            check_settings(runs, read_spec(text, "x"))
    # former versions left no such note
    runs[0].begun_with.unlink()
    check_settings(runs, read_spec(changed["stop_score"], "x"))


def test_task_may_be_trained_to_the_end_though_it_is_solved(tmp_path: Path) -> None:
    text = SMALL.replace("cue-recall: {}", "cue-recall: {train_to_the_end: true}") + "stop_score: -10\n"
    assert "train_to_the_end" in text
    _, runs, _ = run_some(tmp_path, text, ["cue-recall/none/0"])
    assert read(runs[0]).steps == 320


def test_training_ends_once_the_task_is_solved(tmp_path: Path) -> None:
    text = SMALL + "stop_score: -10\nstop_evaluations: 2\n"
    outcome, runs, _ = run_some(tmp_path, text, ["cue-recall/none/0"])
    record = read(runs[0])
    assert not outcome.failed
    assert [step for step, _ in record.curve] == [64, 128]
    assert record.steps == 128


def test_agent_with_a_features_extractor_of_its_own_is_measured(tmp_path: Path) -> None:
    text = SMALL + "  policy.features_extractor: tests.agents.test_checkpoint:OwnExtractor\n"
    outcome, runs, _ = run_some(tmp_path, text, ["cue-recall/none/0"])
    assert not outcome.failed, runs[0].failure.read_text(encoding="utf-8")
    assert read(runs[0]).sampled.episodes == 8


def test_results_that_cannot_be_written_end_the_workers_and_all_is_gone_on_with(tmp_path: Path) -> None:
    text = SMALL.replace("total_steps: 320", "total_steps: 60_000")
    runs = plan_runs(read_spec(text, "x"), tmp_path, ["cue-recall/none/0", "cue-recall/lstm/0"])
    short, long = (run for agent in ("none", "lstm") for run in runs if run.agent == agent)
    short = dataclasses.replace(short, config=dataclasses.replace(short.config, total_steps=64))

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "results.json"))

    # other tests may have left some
    before, begun = {*multiprocessing.active_children()}, time.monotonic()
    with pytest.raises(OSError, match="No space left"):
        run_all(
            [long, short], read_spec(text, "x"), workers=2, hours=None, console=Console(quiet=True), after_each=full
        )
    assert {*multiprocessing.active_children()} <= before
    assert time.monotonic() - begun < 60
    assert list(long.folder.glob("checkpoints/*.zip")) and not long.record.exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_benchmark_goes_on_where_it_was(tmp_path: Path, kind: signal.Signals) -> None:
    text = SMALL.replace("total_steps: 320", "total_steps: 6_000").replace("every_steps: 64", "every_steps: 320")
    spec = tmp_path / "spec.yaml"
    spec.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "xlstm_rl", "bench", "run", str(spec), "--only", "cue-recall/lstm/0", "--out"]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    started = subprocess.Popen([*command, str(tmp_path / "out")], cwd=ROOT, env=environ, start_new_session=True)
    run = plan_runs(read_spec(text, "x"), tmp_path / "out", ["cue-recall/lstm/0"])[0]
    while not any(run.folder.glob("checkpoints/*.zip")):
        assert started.poll() is None
        time.sleep(0.1)
    if kind == signal.SIGINT:
        # as a terminal sends Ctrl-C, to all processes that were started in it
        os.killpg(started.pid, kind)
    else:
        started.send_signal(kind)
    assert started.wait(60) == (-kind if kind == signal.SIGKILL else 128 + kind)
    assert not run.record.exists()
    subprocess.run([*command, str(tmp_path / "out")], cwd=ROOT, check=True)
    subprocess.run([*command, str(tmp_path / "whole")], cwd=ROOT, check=True)
    whole = plan_runs(read_spec(text, "x"), tmp_path / "whole", ["cue-recall/lstm/0"])[0]
    assert read(run) == read(whole)
