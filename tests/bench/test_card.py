"""What a card says about runs that are made up."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from xlstm_rl.bench import figures
from xlstm_rl.bench.card import common_scores, render
from xlstm_rl.bench.comparison import compare
from xlstm_rl.bench.documents import Code, Section, Table, to_html, to_markdown
from xlstm_rl.bench.results import Figure, Record, Results, StateHealth, read_results, write_results
from xlstm_rl.bench.validity import check
from xlstm_rl.configs import ConfigError

ORACLE, MEMORYLESS, EMPTIED, SIZE, TUNING, STATE, COMPLETE = range(7)


def figure(score: float) -> Figure:
    return Figure(mean_return=score, standard_error=0.001, score=score, episodes=100)


def record(agent: str, seed: int, score: float) -> Record:
    return Record(
        task="t",
        agent=agent,
        seed=seed,
        fingerprint="f",
        ability="hold",
        env="E-v0",
        memory=agent,
        parameters=200,
        memory_parameters=100,
        tuning_runs=0,
        total_steps=90,
        steps=90,
        optimal_return=1.0,
        memoryless_return=0.0,
        curve=[[10 * step, min(score, step / 10)] for step in range(1, 10)],
        greedy=figure(score),
        sampled=figure(score),
        emptied=figure(0.0),
        oracle=figure(1.0),
        longer={"4": figure(score / 2), "16": figure(score / 4)},
        state=StateHealth(bytes_first=8, bytes_last=8, largest=1.0, finite=True, length=16),
        cpu_minutes=0.5,
        versions={"torch": "x"},
    )


def card(*records: Record, **changes: Any) -> Results:
    made = Results(
        name="made-up",
        tasks=("t",),
        agents=("xlstm", "lstm", "none"),
        seeds=(0, 1),
        solved_score=0.9,
        stop_score=None,
        parameters_of={"lstm": "xlstm"},
        records=records or sound(),
        failures={},
        missing=(),
    )
    return dataclasses.replace(made, **changes)


def sound() -> tuple[Record, ...]:
    ends = {"xlstm": 1.0, "lstm": 0.5, "none": 0.0}
    return tuple(record(agent, seed, score) for agent, score in ends.items() for seed in (0, 1))


def changed(agent: str, **changes: Any) -> tuple[Record, ...]:
    return tuple(dataclasses.replace(r, **changes) if r.agent == agent else r for r in sound())


def answers(results: Results) -> list[str]:
    return [item.answer for item in check(results)]


def test_all_checks_of_a_sound_card_hold() -> None:
    assert answers(card()) == ["yes"] * 7


@pytest.mark.parametrize(
    ("records", "broken"),
    [
        (changed("lstm", oracle=figure(0.9)), ORACLE),
        (changed("none", greedy=figure(0.2)), MEMORYLESS),
        (changed("xlstm", emptied=figure(0.5)), EMPTIED),
        (changed("lstm", memory_parameters=120), SIZE),
        (changed("xlstm", tuning_runs=30), TUNING),
        (changed("lstm", state=StateHealth(8, 16, 1.0, True, 16)), STATE),
        (changed("lstm", state=StateHealth(8, 8, 1.0, False, 16)), STATE),
    ],
)
def test_card_that_is_void_says_why(records: tuple[Record, ...], broken: int) -> None:
    assert [index for index, answer in enumerate(answers(card(*records))) if answer == "no"] == [broken]


def test_oracle_over_many_seeds_has_to_come_closer_to_one() -> None:
    off = Figure(mean_return=1.04, standard_error=0.02, score=1.04, episodes=100)
    for seeds, answer in ((1, "yes"), (16, "no")):
        runs = [dataclasses.replace(r, seed=seed, oracle=off) for seed in range(seeds) for r in sound() if r.seed == 0]
        assert answers(card(*runs))[ORACLE] == answer


def test_more_agents_do_not_make_the_oracle_more_certain() -> None:
    off = Figure(mean_return=1.04, standard_error=0.02, score=1.04, episodes=100)
    agents = tuple(f"agent-{number}" for number in range(16))
    runs = [dataclasses.replace(record(agent, 0, 1.0), oracle=off) for agent in agents]
    # and a seed with many runs weighs no more than one with a single run
    runs.append(dataclasses.replace(record(agents[0], 1, 1.0), oracle=figure(1.0)))
    assert answers(card(*runs, agents=agents, parameters_of={}))[ORACLE] == "yes"


def test_lstm_is_compared_with_the_agent_that_it_was_sized_after() -> None:
    large = [record("large", seed, 1.0) for seed in (0, 1)]
    twin = [dataclasses.replace(record("twin", seed, 0.5), memory="lstm") for seed in (0, 1)]
    both = tuple(dataclasses.replace(r, memory_parameters=300) for r in (*large, *twin))
    agents = ("xlstm", "lstm", "none", "large", "twin")
    sized = {"lstm": "xlstm", "twin": "large"}
    assert answers(card(*sound(), *both, agents=agents, parameters_of=sized))[SIZE] == "yes"
    assert answers(card(*sound(), *both, agents=agents, parameters_of=sized | {"twin": "xlstm"}))[SIZE] == "no"


def test_card_with_failed_or_missing_runs_says_so(tmp_path: Path) -> None:
    results = card(failures={"t/lstm/7": "Traceback\nZeroDivisionError: <b>"}, missing=("t/none/8",))
    assert check(results)[COMPLETE].problems == ["t/lstm/7 failed", "1 runs are not done"]
    render(results, tmp_path)
    assert "    ZeroDivisionError: <b>" in (tmp_path / "card.md").read_text(encoding="utf-8")
    assert "ZeroDivisionError: &lt;b&gt;" in (tmp_path / "card.html").read_text(encoding="utf-8")


def test_what_cannot_be_told_is_not_said_to_hold() -> None:
    assert answers(card(*changed("xlstm", oracle=None)))[ORACLE] == "yes"
    without = tuple(dataclasses.replace(r, oracle=None) for r in sound())
    assert answers(card(*without))[ORACLE] == "not known"
    assert answers(card(*sound()[:2]))[MEMORYLESS] == "not known"


def test_row_of_a_task_has_every_column(tmp_path: Path) -> None:
    render(card(), tmp_path)
    lines = (tmp_path / "card.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if line.startswith("| hold | t | xlstm |"))
    cells = [cell.strip() for cell in row.split("|")[4:-1]]
    # worst of the last five evaluations is that at step 50, and 0.9 is reached at step 90
    expected = ["xlstm", "1.00 [1.00, 1.00]", "2 of 2", "90 (2)", "0.50", "0.50", "0.25", "0.00", "200", "8", "0.5"]
    assert cells == expected


def test_agent_with_fewer_seeds_is_marked_and_has_no_interval(tmp_path: Path) -> None:
    results = card(*(run for run in sound() if (run.agent, run.seed) != ("none", 1)))
    render(results, tmp_path)
    text = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert "5 of 5 runs: 1 tasks, 3 agents, up to 2 seeds each" in text
    assert "| none | 0.00 | 0 of 1" in text
    assert "| lstm | 0.50 [0.50, 0.50] | 0 of 2" in text
    assert figures._labels(results) == {"xlstm": "xlstm", "lstm": "lstm", "none": "none (1 seed)"}


def test_agent_that_lacks_tasks_is_marked(tmp_path: Path) -> None:
    others = [dataclasses.replace(r, task="u", cpu_minutes=1.5) for r in sound() if r.agent != "lstm"]
    results = card(*sound(), *others, tasks=("t", "u"))
    render(results, tmp_path)
    text = (tmp_path / "card.md").read_text(encoding="utf-8")
    overall = text.partition("## Tasks")[0]
    assert "| sampled actions | CPU min per run | tuning runs |" in overall
    assert "| xlstm | 1.00 [1.00, 1.00] | 4 of 4" in overall
    assert "| lstm | 0.50 [0.50, 0.50] (1 of 2 tasks) | 0 of 2" in overall
    # the mean of runs of 0.5 and 1.5 minutes, where both tasks were run
    assert "| 1.00 | 1.0 | 0 |" in overall and "| 0.50 | 0.5 | 0 |" in overall
    assert "| hold | t, u | 1.00 [1.00, 1.00] | 0.50 [0.50, 0.50] (1 of 2 tasks) | 0.00" in text
    assert figures._labels(results) == {"xlstm": "xlstm", "lstm": "lstm (1 of 2 tasks)", "none": "none"}


def test_results_are_read_back_as_written(tmp_path: Path) -> None:
    results = card(missing=("t/none/8",))
    write_results(results, tmp_path)
    assert read_results(tmp_path) == results


def test_damaged_results_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"tasks": []}', encoding="utf-8")
    with pytest.raises(ConfigError, match="results.json cannot be used"):
        read_results(tmp_path)


def test_only_seeds_of_both_sides_make_pairs() -> None:
    other = card(record("xlstm", 1, 0.25), record("xlstm", 5, 0.75))
    before, after = common_scores(card(), "lstm", other, "xlstm", ["t"])
    assert [list(scores) for scores in (*before, *after)] == [[0.5], [0.25]]


@pytest.mark.parametrize("change", [{"env": "F-v0"}, {"optimal_return": 2.0}, {"memoryless_return": -1.0}])
def test_task_that_is_another_one_on_the_other_side_is_left_out_and_named(change: dict[str, Any]) -> None:
    others = [dataclasses.replace(r, task="u") for r in sound()]
    before = card(*sound(), *others, tasks=("t", "u"))
    after = card(*(dataclasses.replace(r, **change) for r in sound()), *others, tasks=("t", "u"))
    text = compare(before, after)
    assert "t is not the same task on both sides: E-v0 with 0 to 1 in made-up, " in text
    assert "| u | 2 |" in text and "| t |" not in text and "| all tasks | 2 |" in text
    assert "Left out" not in compare(before, before)
    with pytest.raises(ConfigError, match="no agent, task and seed in common.*task t is another one: E-v0"):
        compare(card(), card(*(dataclasses.replace(r, **change) for r in sound())))
    elsewhere = card(*others, tasks=("u",))
    with pytest.raises(ConfigError, match="in common; the tasks are t; u$"):
        compare(card(*sound(), tasks=("t",)), elsewhere)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"total_steps": 7}, r"lstm, t: steps of training .* before, 7 after"),
        ({"memory": "lstm of another kind"}, r"lstm, t: memory .* before, lstm of another kind after"),
        ({"parameters": 12_345}, r"lstm, t: parameters .* before, 12,345 after"),
        ({"greedy": Figure(0.5, 0.0, 0.5, 3)}, r"lstm, t: episodes \d+ before, 3 after"),
        ({"fingerprint": "another"}, r"lstm: settings that records do not hold differ on t"),
        ({"versions": {"torch": "9.9"}}, r"torch x before, 9.9 after"),
    ],
)
def test_what_was_not_the_same_on_both_sides_stands_above_the_tables(change: dict[str, Any], said: str) -> None:
    after = card(*(dataclasses.replace(r, **change) for r in sound()))
    text = compare(card(), after)
    above = text.partition("| task |")[0]
    assert re.search(said, above), above
    assert "Not the same" not in compare(card(), card())


def test_budgets_and_seeds_of_two_agents_are_compared_too() -> None:
    after = card(*(dataclasses.replace(r, total_steps=7) for r in sound() if r.seed == 0 or r.agent != "none"))
    above = compare(card(), after, ("lstm", "none")).partition("| task |")[0]
    assert re.search("lstm and none, t: steps of training .* before, 7 after", above), above
    assert "memory" not in above


def test_bounds_may_differ_in_their_last_digit() -> None:
    near = card(*(dataclasses.replace(r, optimal_return=1.0 - 1e-15) for r in sound()))
    assert "| t | 2 |" in compare(card(), near)


def test_returns_stand_beside_published_ones(tmp_path: Path) -> None:
    made = dict(tasks=("t", "u"), score="return", published={"t": {"theirs": 0.25}, "u": {"theirs": 0.75}})
    runs = (*sound(), *(dataclasses.replace(r, task="u") for r in changed("xlstm", greedy=figure(0.5))[:3]))
    results = card(*runs, **made)
    render(results, tmp_path)
    rows = [line.split(" | ") for line in (tmp_path / "card.md").read_text(encoding="utf-8").splitlines()]
    first, second, mean = (next(row for row in rows if row[0] == f"| {name}") for name in ("t", "u", "mean of 2 tasks"))
    assert first[1:] == [
        "1.000 ± 0.000 / 1.000 ± 0.000 (0k)",
        *("0.500 ± 0.000 / 0.500 ± 0.000 (0k)", "0.000 ± 0.000 / 0.000 ± 0.000 (0k)", "0.000", "0.250 |"),
    ]
    assert second[2:4] == ["0.500 / 0.500 (1 seed, 0k)", "-"]
    # the second task lacks an agent's runs
    assert mean[1:] == ["0.750 / 1.000", "0.500 / 0.500", "-", "-", "0.500 |"]
    assert (tmp_path / "figures" / "published.png").is_file()
    # nothing is held against bounds that are not known
    assert answers(results) == answers(card())[SIZE:]
    write_results(results, tmp_path)
    assert read_results(tmp_path) == results


def test_cells_cannot_break_a_table() -> None:
    sections = [Section("S", [Table(["a|b", "<i>"], [["1", "2"]]), Code("x < y")])]
    assert "| a\\|b | <i> |\n| --- | ---: |\n| 1 | 2 |" in to_markdown("T", sections, Path())
    page = to_html("T", sections)
    assert "<th>&lt;i&gt;</th>" in page and "<pre>x &lt; y</pre>" in page
