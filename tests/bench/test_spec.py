"""Specifications of benchmarks and the runs that follow from them."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from xlstm_rl.bench import plan
from xlstm_rl.bench.plan import plan_runs
from xlstm_rl.bench.runner import check_settings
from xlstm_rl.bench.spec import load_spec, read_spec, spec_names
from xlstm_rl.configs import ConfigError, load
from xlstm_rl.configs.loading import differences
from xlstm_rl.envs import TaskFacts, TaskPurpose
from xlstm_rl.memory import XLSTM, XLSTMConfig
from xlstm_rl.runs.build import make_env, make_model

OUT = Path("out")
SMALL = "tasks: {parity: }\nagents: {mine: {tuning_runs: 3}}\n"


# What their tasks come from, where that is another package.
PACKAGES = {"popgym": "popgym", "public-popgym": "popgym", "public-minigrid": "minigrid"}


def test_benchmarks_of_the_package_can_be_planned() -> None:
    assert spec_names() == [
        "popgym",
        "public-minigrid",
        "public-popgym",
        "public-rewriting",
        "quick",
        "suite",
        "tracking",
    ]
    for name in spec_names():
        spec = load_spec(name)
        if name in PACKAGES and find_spec(PACKAGES[name]) is None:
            continue
        runs = plan_runs(spec, OUT)
        assert len({run.record for run in runs}) == len(spec.tasks) * sum(
            len(spec.seeds_of(agent)) for agent in spec.agents
        )


def test_records_are_found_again_though_fields_of_tasks_are_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "differences", lambda config: {"memory": {"name": "lstm"}})
    spec = read_spec(SMALL, "x")
    said = (
        "Task(name='parity', purpose=TaskPurpose(ability='state tracking', length='length', odd=False), "
        "facts=TaskFacts(horizon=9, optimal_return=1.0, memoryless_return=0.5), given_ends=False)"
    )
    task = plan.Task("parity", TaskPurpose("state tracking", "length"), TaskFacts(9, 1.0, 0.5), False)
    run = plan.PlannedRun(task, "mine", load("parity"), OUT)
    expected = hashlib.sha256(f'{{"memory": {{"name": "lstm"}}}}{said}(64, None, 5)'.encode()).hexdigest()[:16]
    assert plan.fingerprint(run, spec) == expected


@pytest.mark.parametrize(
    ("now", "before"),
    [
        ({"defaults": "paper", "init": "recall", "blocks": "m"}, {"blocks": "m"}),
        ({"defaults": "paper", "init": "reference"}, {"init": "reference"}),
        ({"blocks": "m", "hidden_size": 8}, {**plan._SETTINGS_OF_GENERAL, "blocks": "m", "hidden_size": 8}),
        ({"name": "gru"}, {"name": "gru"}),
    ],
)
def test_records_are_found_again_though_memories_have_other_defaults(
    now: dict[str, object], before: dict[str, object]
) -> None:
    assert plan._as_of_before({"seed": 3, "memory": now}) == {"seed": 3, "memory": before}


def test_settings_of_the_general_agent_are_the_defaults_of_the_memory() -> None:
    settings: dict[str, Any] = {"defaults": "paper", "init": "recall", **plan._SETTINGS_OF_GENERAL}
    assert XLSTM(4, **settings).config == XLSTMConfig()


def test_lstm_of_equal_size_and_no_memory_are_added() -> None:
    agents = read_spec(SMALL, "x").agents
    assert list(agents) == ["mine", "lstm", "none"]
    assert agents["lstm"].parameters_of == "mine"


def test_baselines_that_are_added_were_not_tuned() -> None:
    agents = read_spec(SMALL, "x").agents
    assert {name: agent.tuning_runs for name, agent in agents.items()} == {"mine": 3, "lstm": 0, "none": 0}


def test_baselines_that_are_there_are_not_added_again() -> None:
    for none in ("memory.name: none", "memory: {name: none}"):
        text = f"tasks: {{parity: }}\nagents: {{a: {{memory: {{name: lstm}}}}, b: {{set: {{{none}}}}}}}"
        assert list(read_spec(text, "x").agents) == ["a", "b"]


def test_agent_of_another_memory_under_a_baseline_s_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="agents.lstm must have the memory 'lstm'"):
        read_spec("tasks: {parity: }\nagents: {lstm: {memory: {name: gru}}}", "x")


def test_agent_without_settings_is_the_preset_itself() -> None:
    run = plan_runs(read_spec(SMALL, "x"), OUT)[0]
    assert run.config == load("parity", ["eval.n_episodes=300"])


def test_memory_of_an_agent_replaces_that_of_the_preset() -> None:
    text = "tasks: {parity: }\nagents: {mine: {memory: {name: xlstm, blocks: m}}}"
    assert plan_runs(read_spec(text, "x"), OUT)[0].config.memory.settings == {"blocks": "m"}


def test_overrides_of_an_agent_go_before_those_of_task_and_benchmark() -> None:
    text = """
    tasks: {long: {base: parity, set: {env.kwargs.length: 12, ppo.gamma: 0.5, ppo.ent_coef: 0.5}}}
    agents: {mine: {set: {ppo.gamma: 0.7}}}
    set: {ppo.ent_coef: 0.1, total_steps: 1e4}
    seeds: [4]
    """
    config = plan_runs(read_spec(text, "x"), OUT)[0].config
    assert (config.ppo.gamma, config.ppo.ent_coef, config.total_steps, config.seed) == (0.7, 0.5, 10_000, 4)
    assert config.env.kwargs == {"length": 12}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("{base: parity, length_parameter: size}", "takes no parameter 'size'"),
        ("{base: pendulum-no-velocity, length_parameter: max_episode_steps}", "does not state its bounds at"),
    ],
)
def test_length_that_cannot_be_measured_is_refused_before_training(task: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_runs(read_spec(f"tasks: {{p: {task}}}\nagents: {{a: }}", "x"), OUT)


def test_matched_lstm_has_as_many_parameters() -> None:
    runs = plan_runs(read_spec(SMALL, "x"), OUT)
    sizes = []
    for run in runs[:2]:
        with closing(make_env(run.config, 1, 0)) as env:
            memory = make_model(run.config, env).policy.memory_actor
        sizes.append(sum(parameter.numel() for parameter in memory.parameters()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.03)


def test_tasks_without_known_bounds_are_scored_by_their_returns() -> None:
    text = "tasks: {Pendulum-v1: {published: {theirs: -150}}}\nagents: {mine: {}}\nscore: return\nlong_episodes: 0\n"
    runs = plan_runs(read_spec(text, "test"), OUT)
    assert {run.task.score(-150.0) for run in runs} == {-150.0}
    with pytest.raises(ConfigError, match="`score: return`"):
        plan_runs(read_spec(text.replace("score: return", ""), "test"), OUT)


def test_agent_may_be_trained_for_a_share_of_the_steps() -> None:
    text = "tasks: {parity: {set: {total_steps: 1000}}}\n"
    text += "agents: {mine: {}, none: {memory: {name: none}, share_of_steps: 0.25}}"
    steps = {run.agent: run.config.total_steps for run in plan_runs(read_spec(text, "test"), OUT)}
    assert steps == {"mine": 1000, "none": 250, "lstm": 1000}
    with pytest.raises(ConfigError, match="share_of_steps=0.0 must be above 0"):
        read_spec(text.replace("0.25", "0.0"), "test")


def test_runs_come_seed_by_seed() -> None:
    agents = "agents: {lstm: {memory: {name: lstm}}, none: {memory: {name: none}}}"
    text = f"tasks: {{parity: , tmaze: }}\n{agents}\nseeds: [5, 3]"
    names = [run.name for run in plan_runs(read_spec(text, "x"), OUT)]
    assert names[:4] == ["parity/lstm/5", "parity/none/5", "tmaze/lstm/5", "tmaze/none/5"]
    assert names[4] == "parity/lstm/3"


def test_agent_may_have_some_of_the_seeds() -> None:
    text = "tasks: {parity: }\nagents: {a: , lstm: {memory: {name: lstm}, seeds: [2]}, none: {memory: {name: none}}}"
    names = [run.name for run in plan_runs(read_spec(text + "\nseeds: [1, 2]", "x"), OUT)]
    assert names == ["parity/a/1", "parity/none/1", "parity/a/2", "parity/lstm/2", "parity/none/2"]


@pytest.mark.parametrize(
    ("only", "count"), [(["parity"], 15), (["*/none"], 5), (["parity/lstm/2"], 1), (["*/*/0", "*/*/1"], 6)]
)
def test_only_takes_parts_of_names(only: list[str], count: int) -> None:
    assert len(plan_runs(read_spec(SMALL, "x"), OUT, only)) == count


def test_only_that_fits_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="'tmaze' fits no run; the first is 'parity/mine/0'"):
        plan_runs(read_spec(SMALL, "x"), OUT, ["parity", "tmaze"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("agents: {a: }", "x lacks tasks; give it"),
        ("tasks: {}\nagents: {a: }", "tasks must hold at least one"),
        ("tasks: {parity: {bas: 1}}\nagents: {a: }", "unknown key 'tasks.parity.bas' in x; did you mean 'base'"),
        ("tasks: {parity: }\nagents: {a b: }", "agent 'a b' becomes a folder"),
        ("tasks: {parity: }\nagents: {a: {parameters_of: b}}", "parameters_of='b'"),
        ("tasks: {parity: }\nagents: {a: {memory: {name: lstm, hidden_size: 9}, parameters_of: b}}", "hidden_size"),
        ("tasks: {parity: }\nagents: {a: {memory: {name: lstm}, set: {memory.hidden_size: 9}}}", "use one"),
        ("tasks: {parity: }\nagents: {a: {set: {env.kwargs.length: 9}}}", "must be the same for all agents"),
        ("tasks: {parity: }\nagents: {a: {set: {env: {kwargs: {length: 9}}}}}", "env.kwargs.length must be the same"),
        ("tasks: {parity: }\nagents: {a: {set: {env.kwargs: {length: 9}}}}", "env.kwargs.length must be the same"),
        ("tasks: {parity: }\nagents: {a: {set: {env: {id: CartPole-v1}}}}", "env.id must be the same"),
        ("tasks: {parity: }\nagents: {a: {memory: {name: lstm}, set: {memory: {hidden_size: 9}}}}", "use one"),
        ("tasks: {parity: {ability: holding}}\nagents: {a: }", "ability='holding'"),
        ("tasks: {parity: {optimal_return: 1}}\nagents: {a: }", "give both or none"),
        (
            "tasks: {parity: {optimal_return: 1, memoryless_return: 0, length_parameter: length}}\nagents: {a: }",
            "length_parameter='length' is of no use beside optimal_return",
        ),
        ("tasks: {parity: }\nagents: {a: }\nseeds: [1, 1]", r"seeds=\[1, 1\]"),
        ("tasks: {parity: }\nagents: {a: {seeds: [5]}}", r"agents.a.seeds=\[5\] must be some of"),
        ("tasks: {parity: }\nagents: {a: {seeds: []}}", r"agents.a.seeds=\[\] must be some of"),
        ("tasks: {parity: }\nagents: {a: }\nepisodes: 0", "episodes=0"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_spec(text, "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: {partiy: }\nagents: {a: }", "task partiy, agent a: 'partiy' is neither"),
        ("tasks: {CartPole-v1: }\nagents: {a: }", "give optimal_return and memoryless_return"),
        ("tasks: {parity: {set: {ppo.gama: 1}}}\nagents: {a: }", "did you mean 'gamma'"),
        # two and three pulls: the last one tells all that the ones before it told
        (
            "tasks: {short: {base: bandit, set: {env.kwargs.num_pulls: 2}}}\nagents: {a: }",
            "task short: optimal_return=0.59 of 'xlstm_rl/Bandit-v0' .* is not above memoryless_return=0.59,.* choose",
        ),
        (
            "tasks: {short: {base: bandit, set: {env.kwargs.num_pulls: 3}}}\nagents: {a: }",
            "task short: optimal_return=",
        ),
        ("tasks: {one: {base: pairs, set: {env.kwargs.num_turns: 1}}}\nagents: {a: }", "task one: optimal_return="),
        (
            "tasks: {parity: {optimal_return: 0, memoryless_return: 1}}\nagents: {a: }",
            "task parity: optimal_return=0 of .* is not above memoryless_return=1",
        ),
        (
            "tasks: {parity: }\nagents: {a: {memory: {name: none}}, b: {memory: {name: lstm}, parameters_of: a}}",
            "agent b: .*memory 'lstm': match_parameters",
        ),
    ],
)
def test_runs_that_cannot_be_configured_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_runs(read_spec(text, "x"), OUT)


def test_unknown_benchmark_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'quick'"):
        load_spec("quik")


def test_untuned_agent_takes_the_defaults_on_the_task_s_environment() -> None:
    text = """
    tasks: {long: {base: cartpole-no-velocity, set: {total_steps: 1e4, ppo.gamma: 0.5, eval.n_envs: 4}}}
    agents: {tuned: {}, plain: {tuned: false, set: {ppo.ent_coef: 0.2}}}
    seeds: [4]
    """
    tuned, plain = (run.config for run in plan_runs(read_spec(text, "x"), OUT)[:2])
    default = load(plain.env.id)
    assert (plain.env.kwargs, plain.total_steps, plain.eval) == (tuned.env.kwargs, 10_000, tuned.eval)
    assert (plain.memory, plain.policy, plain.env.n_envs) == (default.memory, default.policy, default.env.n_envs)
    assert plain.ppo == replace(default.ppo, ent_coef=0.2)
    assert tuned.ppo.gamma == 0.5
    assert tuned.env.n_envs == 8


def test_fingerprint_holds_only_what_differs_from_the_defaults() -> None:
    """So that runs stay known when settings are added whose defaults change nothing."""
    assert differences(load("parity", ["seed=3"]))["seed"] == 3
    assert set(differences(load("parity"))["ppo"]) == {
        *("batch_size", "n_epochs", "learning_rate", "lr_schedule", "gamma", "ent_coef")
    }


@pytest.mark.parametrize("name", ["suite", "tracking", "public-rewriting"])
def test_runs_on_the_report_cards_are_those_of_the_settings_of_now(name: str) -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results" / name
    spec = load_spec(name)
    check_settings(plan.plan_runs(spec, folder), spec)
