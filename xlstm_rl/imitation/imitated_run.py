"""A run folder whose agent has learnt from demonstrations, to be played, exported or trained further."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium
from rich.console import Console

from xlstm_rl.configs import ConfigError, TrainConfig
from xlstm_rl.imitation.cloning import as_drawn, imitate, imitation_loss
from xlstm_rl.imitation.demonstrations import read_minari, record_demonstrations, with_memory_inputs
from xlstm_rl.runs.build import (
    check_device,
    make_env,
    make_model,
    normalized,
    read_facts,
    start_from,
    torch_threads,
)
from xlstm_rl.runs.folder import RunFolder
from xlstm_rl.runs.live import SignOfLife, say
from xlstm_rl.runs.scores import final_scores, show_scores
from xlstm_rl.runs.seeds import Purpose, environment_seed
from xlstm_rl.vec_envs.inputs import InputLayout

# The source that is no dataset, and how many of its episodes are taken.
ORACLE, ORACLE_EPISODES = "oracle", 1_000
# One of so many episodes is held out.
HELD_OUT = 10


def imitate_run(
    config: TrainConfig,
    source: str,
    run_dir: Path | str,
    *,
    n_episodes: int | None = None,
    epochs: int = 20,
    console: Console | None = None,
) -> Path:
    """Train the agent of a run to do as in demonstrations, save and evaluate it.

    Args:
        config: the run; `init` says what the agent starts from.
        source: "oracle", or the id of a local Minari dataset.
        run_dir: where it is written; must not exist or be empty.
        n_episodes: how many to take; None: 1,000 of the oracle, all of a dataset.
        epochs: passes over the episodes that are not held out.
        console: shows losses and the closing table; None shows nothing.

    Returns:
        The run folder, which `init.from` takes.

    Raises:
        ConfigError: as for `train`; there is no such source, or its episodes do not fit the environment.
    """
    console = console or Console(quiet=True)
    check_device(config.device)
    facts = read_facts(config.env)
    with torch_threads(config.threads), closing(make_env(config, config.env.n_envs, config.seed, here=True)) as env:
        model = make_model(config, normalized(env, config))
        transfer = start_from(model, config)
        try:
            episodes = _read(config, source, n_episodes, console)
            as_drawn(model, episodes)
        except (ImportError, OSError, ValueError) as error:
            raise ConfigError(f"--from {source}: {error}") from error
        learnt, held_out = _split(episodes)
        folder = RunFolder.create(Path(run_dir), config, versions={"demonstrations": f"{len(episodes)} of {source}"})
        if transfer is not None:
            say(console, f"from {config.init.source}: {transfer}")
        say(console, f"run folder {folder.path}; {len(learnt)} episodes to learn from, {len(held_out)} held out")

        def told(epoch: int, loss: float) -> None:
            unseen = f", of held-out episodes {imitation_loss(model, held_out):.4f}" if held_out else ""
            say(console, f"epoch {epoch + 1} of {epochs}: loss {loss:.4f} nats a step{unseen}")

        imitate(model, learnt, epochs=epochs, on_epoch=told)
        folder.save(model, folder.model)
        seed = environment_seed(config.seed, Purpose.FINAL_EVALUATION)
        scores = final_scores(
            model, config, facts, config.eval.n_episodes, seed, console, max_steps=config.eval.max_steps
        )
        show_scores(console, [*scores], f"{config.env.id} after {len(learnt)} demonstrations")
    return folder.path


def _split(episodes: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Those to learn from, and one of ten that is held out, where there are as many."""
    held_out = [*range(HELD_OUT - 1, len(episodes), HELD_OUT)]
    learnt = [episode for index, episode in enumerate(episodes) if index not in {*held_out}]
    return learnt, [episodes[index] for index in held_out]


def _read(config: TrainConfig, source: str, n_episodes: int | None, console: Console) -> Sequence[Any]:
    if source == ORACLE:
        n_episodes = n_episodes or ORACLE_EPISODES
        seed = environment_seed(config.seed, Purpose.DEMONSTRATION)
        alive = SignOfLife(console, "the oracle", n_episodes)
        with closing(make_env(config, min(config.env.n_envs, n_episodes), seed, here=True)) as env:
            return record_demonstrations(env, n_episodes, seed=seed, on_step=alive)
    episodes = read_minari(source)[:n_episodes]
    if not config.env.memory_inputs:
        return episodes
    with closing(gymnasium.make(config.env.id, **config.env.kwargs)) as env:
        layout = InputLayout(env.observation_space, env.action_space, config.env.memory_inputs)
    return [with_memory_inputs(episode, layout) for episode in episodes]
