"""A small benchmark from the command line to the card, in worker processes."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.bench.small_bench import SMALL
from xlstm_rl import cli
from xlstm_rl.bench.results import Results, read_results
from xlstm_rl.configs import load_file
from xlstm_rl.runs.lock import exclusive

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def spec_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spec") / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def out(spec_path: Path) -> Path:
    """The folder of a benchmark that was done in two parts, the first a single run."""
    out = spec_path.parent / "out"
    assert cli.main(["bench", "run", str(spec_path), "--out", str(out), "--only", "far/none/1"]) == 0
    assert cli.main(["bench", "run", str(spec_path), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def results(out: Path) -> Results:
    return read_results(out)


def test_every_run_has_its_record(results: Results) -> None:
    names = {(record.task, record.agent, record.seed) for record in results.records}
    assert names == {(t, a, s) for t in ("cue-recall", "far") for a in ("lstm", "none") for s in (0, 1)}
    assert not results.missing and not results.failures


def test_record_tells_what_was_trained_and_measured(results: Results) -> None:
    record = results.of("cue-recall", "lstm")[1]
    assert (record.seed, record.ability, record.env, record.memory) == (1, "hold", "xlstm_rl/CueRecall-v0", "lstm")
    assert record.steps == record.total_steps == 320
    assert [step for step, _ in record.curve] == [64, 128, 192, 256, 320]
    assert record.greedy.episodes == record.sampled.episodes == 8
    assert set(record.longer) == {"4", "16"} and record.longer["16"].episodes == 2
    assert record.state.length == 16 and record.state.bytes_first == record.state.bytes_last == 8 * 2 * 4
    assert 0 < record.state.largest and record.state.finite
    assert record.parameters > record.memory_parameters > 0
    assert record.cpu_minutes > 0 and record.versions["torch"]


def test_bounds_that_were_given_hold_for_episodes_in_a_row(results: Results) -> None:
    for record in results.records:
        assert record.in_a_row == (record.task == "far")
    for record in results.of("far", "none"):
        assert set(record.longer) == {"4", "16"} and record.longer["16"].episodes == 2
        # of 3 answers an episode each, mean over 2 times 16 episodes
        assert record.longer["16"].mean_return * 96 == pytest.approx(
            round(record.longer["16"].mean_return * 96), abs=1e-4
        )
        assert 0 < record.longer["16"].mean_return < 1


def test_oracle_scores_one_in_the_same_episodes(results: Results) -> None:
    assert all(record.oracle is not None and record.oracle.score == 1 for record in results.records)


def test_score_is_the_place_between_the_ends(results: Results) -> None:
    for record in results.records:
        span = record.optimal_return - record.memoryless_return
        assert record.greedy.score == pytest.approx((record.greedy.mean_return - record.memoryless_return) / span)


def test_run_folders_are_those_of_train(out: Path) -> None:
    config = load_file(out / "runs" / "far" / "lstm" / "1" / "config.yaml")
    assert (config.seed, config.memory.name, config.env.kwargs) == (1, "lstm", {"length": 3})


def test_csv_has_a_line_for_each_run(out: Path) -> None:
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 8
    assert {line["ability"] for line in lines} == {"hold", "credit"}
    assert all(float(line["oracle"]) == 1 for line in lines)


def test_card_has_every_row_that_makes_it_worth_something(out: Path) -> None:
    text = (out / "card.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| hold | cue-recall |")]
    assert [row[2].strip() for row in rows[:3]] == ["oracle", "lstm", "none"]
    assert rows[0][4].strip() == "1.00"
    assert "| The scripted oracle scores 1 in the episodes that the agents played | yes |" in text
    assert "| Every planned run was finished | yes |" in text


def test_page_needs_no_other_file(out: Path) -> None:
    text = (out / "card.html").read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 4
    assert 'src="' in text and "http" not in text


def test_card_is_rendered_from_the_results_alone(out: Path, tmp_path: Path) -> None:
    shutil.copy(out / "results.json", tmp_path)
    assert cli.main(["bench", "render", str(tmp_path)]) == 0
    assert (tmp_path / "card.md").read_bytes() == (out / "card.md").read_bytes()
    assert all((tmp_path / "figures" / f"{name}.png").read_bytes().startswith(PNG) for name in ("curves", "lengths"))


def test_what_is_done_is_not_done_again(spec_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xlstm_rl.bench.runner._Pool.start", None)
    before = (out / "results.json").read_bytes()
    assert cli.main(["bench", "run", str(spec_path), "--out", str(out)]) == 0
    assert (out / "results.json").read_bytes() == before


@pytest.mark.parametrize("change", [("ppo.n_epochs: 1", "ppo.n_epochs: 2"), ("long_episodes: 2", "long_episodes: 3")])
def test_runs_made_with_other_settings_are_refused(
    change: tuple[str, str], spec_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = spec_path.with_name("other.yaml")
    other.write_text(SMALL.replace(*change), encoding="utf-8")
    assert cli.main(["bench", "run", str(other), "--out", str(out)]) == 2
    assert "made with other settings" in capsys.readouterr().err


def test_records_of_other_settings_are_refused_though_other_runs_were_asked_for(
    spec_path: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(out, tmp_path / "out")
    # what is known of the runs stands in results.json, and folders of runs may be removed
    shutil.rmtree(tmp_path / "out" / "runs")
    kept = [
        line for line in (tmp_path / "out" / "results.json").read_text().splitlines() if '"agent": "lstm"' not in line
    ]
    text = "\n".join(kept).rstrip().replace("},\n ]", "}\n ]")
    (tmp_path / "out" / "results.json").write_text(text, encoding="utf-8")
    before = (tmp_path / "out" / "results.json").read_bytes()
    other = tmp_path / "other.yaml"
    other.write_text(SMALL.replace("long_episodes: 2", "long_episodes: 3"), encoding="utf-8")
    options = ["--out", str(tmp_path / "out"), "--only", "cue-recall/lstm/0", "--hours", "0"]
    assert cli.main(["bench", "run", str(other), *options]) == 2
    assert "cue-recall/none/0" in (said := capsys.readouterr().err) and "made with other settings" in said
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_runs_may_be_chosen_by_several_options(
    spec_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--hours", "0", "--only", "far/none/1", "--only", "cue-recall/none", "far/lstm/0"]
    assert cli.main(["bench", "run", str(spec_path), "--out", str(tmp_path), *options]) == 3
    assert "4 runs are left" in capsys.readouterr().err


def test_second_run_in_the_same_folder_is_refused(
    spec_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "run", str(spec_path), "--out", str(tmp_path / "out"), "--hours", "0"]
    (tmp_path / "out").mkdir()
    with exclusive(tmp_path / "out" / "lock"):
        assert cli.main(command) == 2
    assert f"process {os.getpid()} on " in (said := capsys.readouterr().err) and "choose another --out" in said
    assert not (tmp_path / "out" / "results.json").exists()
    # the lock ends with its holder
    assert cli.main(command) == 3


def test_folder_that_cannot_be_made_is_told(
    spec_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["bench", "run", str(spec_path), "--out", str(tmp_path / "file"), "--hours", "0"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_no_run_starts_after_the_hours_are_over(spec_path: Path, tmp_path: Path) -> None:
    assert cli.main(["bench", "run", str(spec_path), "--out", str(tmp_path), "--hours", "0"]) == 3
    assert len(json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["missing"]) == 8


def test_comparison_with_itself_finds_no_difference(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "compare", str(out), str(out)]) == 0
    text = capsys.readouterr().out
    assert text.count("| 0.00 [0.00, 0.00] | 0.50 [0.50, 0.50] |") == 2 * 3


def test_two_agents_can_be_compared(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "compare", str(out), str(out), "--agents", "none", "lstm"]) == 0
    assert "Before: none of small. After: lstm of small." in capsys.readouterr().out


def test_comparison_names_an_unknown_agent(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "compare", str(out), str(out), "--agents", "lstmm", "lstm"]) == 2
    assert "'lstmm' is no agent of small; did you mean 'lstm'?" in capsys.readouterr().err


def test_folder_without_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "render", str(tmp_path)]) == 2
    assert "results.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_wrong_number_of_workers_is_told(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "run", "quick", f"--workers={text}"])
    assert f"--workers: {text!r} must be a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("hours", ("nan", "inf", "-1", "1e300", "soon"))
def test_hours_that_are_no_time_are_refused(hours: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "run", "suite", "--out", str(tmp_path / "out"), f"--hours={hours}"])
    assert f"'{hours}' must be a number of at least 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
