"""Scores of a run: the trained agent between its reference points, played and shown as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from stable_baselines3.common.vec_env import VecEnv

from xlstm_rl.agents import RecurrentPPO
from xlstm_rl.agents.evaluation import EvaluationResult, evaluate, evaluate_random
from xlstm_rl.configs import TrainConfig, load, preset_names
from xlstm_rl.envs import TaskFacts
from xlstm_rl.runs.build import make_env, normalized_like
from xlstm_rl.runs.live import SignOfLife, printable
from xlstm_rl.runs.returns import Row

TRAINED, SAMPLED = "trained agent", "same agent, actions sampled as in training"
EMPTIED, RANDOM = "same agent, memory emptied every step", "random actions"
MEMORYLESS, OPTIMUM = "best without memory", "optimum"


class Score(NamedTuple):
    """One line of the table.

    Attributes:
        agent: whom it is about.
        mean_return: over its episodes.
        standard_error: of the mean return, None where it is known exactly.
        success: share of successes, None where the task does not say.
        episodes: how many were played, None where none had to be.
        cut_episodes: how many of them did not end within `eval.max_episode_steps`.
    """

    agent: str
    mean_return: float
    standard_error: float | None = None
    success: float | None = None
    episodes: int | None = None
    cut_episodes: int = 0


def final_scores(
    model: RecurrentPPO,
    config: TrainConfig,
    facts: TaskFacts | None,
    n_episodes: int,
    seed: int,
    console: Console,
    check: Callable[[], object] = lambda: None,
    *,
    max_steps: int | None = None,
) -> Iterator[Score]:
    """The agent, the same one sampling, then without memory, random actions and the known bounds, one after the other.

    Args:
        model: agent of the run.
        config: the run.
        facts: known bounds of the task, None if there are none.
        n_episodes: episodes to finish.
        seed: of the environments, and of what the policy samples.
        console: told now and then how far it is.
        check: called after every step, to end the evaluation by an exception.
        max_steps: of each agent, as for `evaluate`.
    """
    for agent, sampled, emptied in ((TRAINED, False, False), (SAMPLED, True, False), (EMPTIED, False, True)):
        alive = SignOfLife(console, f"the {agent}", n_episodes, check)
        how: dict[str, Any] = {"deterministic": not sampled, "empty_state_every_step": emptied, "max_steps": max_steps}
        yield score(agent, play(model, config, n_episodes, seed, on_step=alive, **how), config)
    with closing(make_env(config, min(config.eval.n_envs, n_episodes), seed, here=True)) as env:
        limit, alive = config.eval.max_episode_steps, SignOfLife(console, RANDOM, n_episodes, check)
        played = evaluate_random(
            env, n_episodes, seed=seed, max_episode_steps=limit, max_steps=max_steps, on_step=alive
        )
        yield score(RANDOM, played, config)
    if facts is not None:
        yield Score(MEMORYLESS, facts.memoryless_return)
        yield Score(OPTIMUM, facts.optimal_return)


def remarks(scores: Sequence[Score], config: TrainConfig, steps: int) -> list[str]:
    """What the table means, where somebody new might not see it.

    Args:
        scores: lines of the table.
        config: the run.
        steps: that it was trained for.
    """
    of = {score.agent: score for score in scores}
    if not {TRAINED, SAMPLED, EMPTIED, RANDOM} <= of.keys():
        return []
    trained = of[TRAINED]
    below = [agent for agent in (RANDOM, MEMORYLESS) if agent in of and not _above(trained, of[agent])]
    best = OPTIMUM in of and not _above(of[OPTIMUM], trained)
    if below and not best:
        usual = _usual_steps(config)
        of_usual = f" of the {usual:,} of its preset" if usual is not None and usual > steps else ""
        said = [
            f"the agent ({trained.mean_return:.2f}) is not above {below[0]} ({of[below[0]].mean_return:.2f}): probably "
            f"trained too short, {steps:,} steps{of_usual}; go on with a larger total_steps"
        ]
        if _above(of[SAMPLED], trained):
            said.append("its sampled actions do better than its most likely ones, as is usual early in training")
        return said
    if config.memory.name != "none" and not _above(trained, of[EMPTIED]):
        return [
            f"with its memory emptied at every step the agent does as well ({of[EMPTIED].mean_return:.2f}): memory "
            "gains nothing here, the task can be done without"
        ]
    return []


def _above(one: Score, other: Score) -> bool:
    """Whether a mean return is above another by more than chance."""
    noise = math.hypot(one.standard_error or 0.0, other.standard_error or 0.0)
    return one.mean_return - other.mean_return > max(2 * noise, 1e-6)


def _usual_steps(config: TrainConfig) -> int | None:
    """Steps of the preset that a run was made from, if there is one."""
    presets = (load(name) for name in preset_names())
    return next(
        (
            preset.total_steps
            for preset in presets
            if preset.env.id == config.env.id and preset.description == config.description
        ),
        None,
    )


def play(
    model: Any,
    config: TrainConfig,
    n_episodes: int,
    seed: int,
    *,
    wrap: Callable[[VecEnv], VecEnv] | None = None,
    **how: Any,
) -> EvaluationResult:
    """Play episodes in new environments of a run.

    Args:
        model: agent of the run, with the normalisation that its environment has at present.
        config: the run.
        n_episodes: episodes to finish.
        seed: of the environments, and of what the policy samples.
        wrap: put around the environments, outermost.
        **how: `deterministic`, `empty_state_every_step`, `max_episode_steps` and `on_step`, as for `evaluate`; episodes
            are cut where the run cuts them if nothing else is said.
    """
    with closing(make_env(config, min(config.eval.n_envs, n_episodes), seed, here=True)) as env:
        env = normalized_like(env, model.get_vec_normalize_env())
        how = {"max_episode_steps": config.eval.max_episode_steps, **how}
        return evaluate(model, env if wrap is None else wrap(env), n_episodes, seed=seed, **how)


def score(agent: str, result: EvaluationResult, config: TrainConfig) -> Score:
    """What an agent reached; a success is what the task says, or else a return as high as the run asks for."""
    successes = result.successes
    if successes is None and config.eval.success_return is not None:
        successes = result.returns >= config.eval.success_return
    return Score(
        agent=agent,
        mean_return=result.mean_return,
        standard_error=result.standard_error,
        success=None if successes is None else float(successes.mean()),
        episodes=len(result.returns),
        cut_episodes=result.cut_episodes,
    )


def worst_of_last(rows: list[Row], count: int) -> list[Score]:
    """The worst of the last evaluations during training; nothing if there were fewer than `count`."""
    if len(rows) < count:
        return []
    worst = min(rows[-count:], key=lambda row: row.mean_return)
    name = f"worst of the last {count} evaluations"
    return [Score(name, worst.mean_return, success=worst.success, episodes=worst.episodes)]


def show_scores(console: Console, scores: Sequence[Score], title: str) -> None:
    """Print the scores as a table, in whatever characters the console has."""
    console.print(score_table(scores, printable(console, title), plus_minus=_plus_minus(console)))


def score_table(scores: Sequence[Score], title: str, *, plus_minus: str = "±") -> Table:
    """The scores as a rich table; the success column only where any is known."""
    show_success = any(score.success is not None for score in scores)
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("agent")
    for column in ("return", *(("success",) if show_success else ()), "episodes"):
        table.add_column(column, justify="right")
    for score in scores:
        mean = f"{score.mean_return:,.0f}" if abs(score.mean_return) >= 100 else f"{score.mean_return:.2f}"
        error = "" if score.standard_error is None else f" {plus_minus} {_two_digits(score.standard_error)}"
        success = [_or_dash(score.success, ".2f")] if show_success else []
        cut = f" ({score.cut_episodes} cut)" if score.cut_episodes else ""
        table.add_row(score.agent, mean + error, *success, _or_dash(score.episodes, "d") + cut)
    return table


def _plus_minus(console: Console) -> str:
    return "±" if printable(console, "±") == "±" else "+-"


def _two_digits(value: float) -> str:
    """A number with two significant digits and no exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.2g}"
    decimals = min(max(1 - math.floor(math.log10(abs(value))), 0), 6)
    return f"{value:,.{decimals}f}"


def _or_dash(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
