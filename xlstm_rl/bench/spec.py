"""The specification of a benchmark: tasks, agents, seeds and how they are measured, read from YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from xlstm_rl.configs import ConfigError
from xlstm_rl.configs.validation import Count, Flag, Natural, Real, Word, build, nearest, parse_yaml, settings
from xlstm_rl.envs import ABILITIES

# Without it, an LSTM does not learn to hold anything within the budgets here, and a comparison would flatter the xLSTM.
LSTM_FORGET_BIAS = 3.0
# In YAML a task or an agent of which nothing is said is a key without a value.
NOTHING_SET = BeforeValidator(lambda value: {} if value is None else value)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@settings
class TaskSpec:
    """A task of the benchmark.

    Attributes:
        base: a preset, a .yaml file or an environment id; None takes the task's name.
        set: overrides of its configuration, such as `env.kwargs.length: 12`.
        ability, length_parameter: None where `xlstm_rl.envs.task.PURPOSES` knows them.
        optimal_return, memoryless_return: known bounds of a task that does not state them itself; they hold for its
            training length alone.
        train_to_the_end: do not stop training early, whatever the benchmark's `stop_score`: what is learned after a
            task is solved shows in longer episodes.
        published: mean returns that others have published, by the name of the column that shows them.
    """

    base: Word | None = None
    set: Mapping[str, Any] = field(default_factory=dict)
    ability: Word | None = None
    length_parameter: Word | None = None
    optimal_return: Real | None = None
    memoryless_return: Real | None = None
    train_to_the_end: Flag = False
    published: Mapping[str, Real] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ability is not None and self.ability not in ABILITIES:
            raise ValueError(f"ability={self.ability!r} is none of the suite's; {nearest(self.ability, ABILITIES)}")
        if (self.optimal_return is None) != (self.memoryless_return is None):
            raise ValueError("optimal_return and memoryless_return make a score together; give both or none")
        if self.optimal_return is not None and self.optimal_return == self.memoryless_return:
            raise ValueError(f"optimal_return={self.optimal_return} must differ from memoryless_return")
        if self.optimal_return is not None and self.length_parameter is not None:
            raise ValueError(
                f"length_parameter={self.length_parameter!r} is of no use beside optimal_return, which holds for the "
                "training length alone; leave it out, and several episodes are played in a row"
            )


@settings
class AgentSpec:
    """An agent of the benchmark: the task's own training with what differs.

    Attributes:
        tuned: trained with the settings of each task's preset; false uses those of a plain environment id instead, the
            same on every task, and takes from the task only the environment itself, its budget and its evaluation.
        memory: name and settings of the memory on every task; None keeps each task's own.
        set: overrides of the configuration, on top of those of the task.
        parameters_of: the agent whose number of memory parameters this one's `hidden_size` is chosen to match.
        tuning_runs: runs spent on choosing this agent's settings; stated on the card.
        seeds: of its runs, some of the benchmark's; None takes all.
        share_of_steps: of each task's budget that it is trained for, above 0 and up to 1; the card says so.
    """

    tuned: Flag = True
    memory: Mapping[str, Any] | None = None
    set: Mapping[str, Any] = field(default_factory=dict)
    parameters_of: Word | None = None
    tuning_runs: Natural = 0
    seeds: tuple[Natural, ...] | None = None
    share_of_steps: Real = 1.0

    def __post_init__(self) -> None:
        if self.memory is not None and any(str(key).startswith("memory") for key in self.set):
            raise ValueError("an agent has its memory settings either in memory or as memory.* in set; use one")
        for key in _dotted(self.set):
            if key in ("env.id", "seed", "total_steps") or key.startswith("env.kwargs"):
                raise ValueError(f"{key} must be the same for all agents; set it for the task or the benchmark")
        if not 0 < self.share_of_steps <= 1:
            raise ValueError(f"share_of_steps={self.share_of_steps} must be above 0 and at most 1")
        if self.parameters_of is not None and "hidden_size" in (self.memory or {}):
            raise ValueError("parameters_of chooses hidden_size; leave memory.hidden_size out")

    @property
    def memory_name(self) -> str | None:
        """The name of the memory that the agent has on every task; None where it is each task's own."""
        name = _dotted(self.set).get("memory.name") if self.memory is None else self.memory.get("name")
        return None if name is None else str(name)

    def with_memory(self, name: str, parameters_of: str | None = None, **settings: Any) -> AgentSpec:
        """The same training with another memory, which nothing was tuned for."""
        kept = {key: value for key, value in self.set.items() if not key.startswith("memory")}
        memory = {"name": name, **settings}
        return replace(self, memory=memory, set=kept, parameters_of=parameters_of, tuning_runs=0)


@settings
class BenchSpec:
    """A benchmark.

    Attributes:
        tasks, agents: by name. The first agent is the one the others are compared with.
        description: one line for `xlstm-rl list`.
        seeds: of the runs; each agent and task is trained once with each.
        set: overrides for every run.
        episodes: of each evaluation of final weights; a task's `set: {eval.n_episodes: N}` takes precedence.
        long_episodes: of each evaluation at several times the training length; 0 plays none.
        score: "memory" counts from the best policy without memory, 0, to the optimum, 1, and asks for tasks with
            known bounds; "return" takes mean returns as they are, as those who publish theirs do.
        solved_score: a run with at least this score has solved its task.
        stop_score, stop_evaluations: training ends early once this many evaluations in a row reach the score; None
            trains every run to its end.
    """

    tasks: Mapping[Word, Annotated[TaskSpec, NOTHING_SET]]
    agents: Mapping[Word, Annotated[AgentSpec, NOTHING_SET]]
    description: Word | None = None
    seeds: tuple[Natural, ...] = (0, 1, 2, 3, 4)
    set: Mapping[str, Any] = field(default_factory=dict)
    episodes: Count = 300
    long_episodes: Natural = 64
    score: Literal["memory", "return"] = "memory"
    solved_score: Real = 0.9
    stop_score: Real | None = None
    stop_evaluations: Count = 5

    def __post_init__(self) -> None:
        for name, values in (("tasks", self.tasks), ("agents", self.agents), ("seeds", self.seeds)):
            if not values:
                raise ValueError(f"{name} must hold at least one entry")
        for kind, names in (("task", self.tasks), ("agent", self.agents)):
            for name in names:
                if not _NAME.fullmatch(name):
                    raise ValueError(f"{kind} {name!r} becomes a folder: use letters, digits, '.', '-' and '_'")
        if len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} must be different")
        for name, agent in self.agents.items():
            if agent.seeds is not None and not ({*agent.seeds} and {*agent.seeds} <= {*self.seeds}):
                raise ValueError(
                    f"agents.{name}.seeds={list(agent.seeds)} must be some of the benchmark's, {list(self.seeds)}"
                )
            other = agent.parameters_of
            if other is not None and (other not in self.agents or self.agents[other].parameters_of is not None):
                known = [key for key, value in self.agents.items() if value.parameters_of is None]
                raise ValueError(
                    f"agents.{name}.parameters_of={other!r} must be an agent of its own size; {nearest(other, known)}"
                )

    def seeds_of(self, agent: str) -> tuple[int, ...]:
        """Seeds of the runs of an agent."""
        seeds = self.agents[agent].seeds
        return self.seeds if seeds is None else seeds

    def stop_score_of(self, task: str) -> float | None:
        """The score at which training on a task ends early; None if it never does."""
        return None if self.tasks[task].train_to_the_end else self.stop_score


def spec_names() -> list[str]:
    """Names of the benchmarks that come with the package, sorted."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _specs().iterdir() if entry.name.endswith(".yaml"))


def load_spec(name: str) -> BenchSpec:
    """The benchmark `name`, with the baselines added that give its figures a meaning.

    These are "none", the same training without memory, and "lstm", an LSTM of as many parameters as the first agent's
    memory, with its forget gates open at the start, as the mLSTM's are; each is added where no agent has such a memory.

    Args:
        name: one that comes with the package, or a path ending in ".yaml".

    Raises:
        ConfigError: it cannot be read, or a key or value is wrong; the message names it.
    """
    if name in spec_names():
        return read_spec((_specs() / f"{name}.yaml").read_text(encoding="utf-8"), f"benchmark {name}.yaml")
    if not name.endswith((".yaml", ".yml")):
        raise ConfigError(f"{name!r} is no benchmark and no .yaml file; {nearest(name, spec_names())}")
    try:
        return read_spec(Path(name).read_text(encoding="utf-8"), name)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {name}: {error}") from error


def read_spec(text: str, source: str) -> BenchSpec:
    """As `load_spec`, from YAML text; `source` names it in messages."""
    values = parse_yaml(text, source)
    spec = build(BenchSpec, {} if values is None else values, source)
    try:
        return _with_baselines(spec)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _with_baselines(spec: BenchSpec) -> BenchSpec:
    agents = dict(spec.agents)
    first = next(iter(agents))
    memories = {agent.memory_name for agent in agents.values()}
    if "lstm" not in memories:
        target = agents[first].parameters_of or first
        _add(agents, "lstm", agents[first].with_memory("lstm", target, forget_bias=LSTM_FORGET_BIAS))
    if "none" not in memories:
        _add(agents, "none", agents[first].with_memory("none"))
    return replace(spec, agents=agents)


def _add(agents: dict[str, AgentSpec], name: str, agent: AgentSpec) -> None:
    if name in agents:
        raise ConfigError(f"agents.{name} must have the memory {name!r}, which every benchmark has, or another name")
    agents[name] = agent


def _dotted(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """The overrides with nested keys spelled as one, such as env.kwargs.length."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{key}"
        found |= _dotted(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def _specs() -> Any:
    return resources.files("xlstm_rl.bench") / "specs"
