"""What can be read from a memory: linear probes for the hidden variable of a task, step by step."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from torch import Tensor

from xlstm_rl.agents.actor_critic import MemoryActorCritic, evaluating
from xlstm_rl.agents.checkpoint import write_whole
from xlstm_rl.agents.heads import masks_actions, read_masks
from xlstm_rl.agents.training_state import statistics_kept
from xlstm_rl.memory import leaf_names, leaves
from xlstm_rl.vec_envs.env_contract import reset_envs, step_envs

OBSERVATION = "observation alone"
# Steps at which fewer episodes than this are still running are not probed: half of them train the probe.
FEWEST_EPISODES = 40
# More steps than this are thinned out.
MOST_STEPS = 60
# Of the ridge, in units of the mean square of a standardised feature; the best by leaving one episode out is taken.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


class Probe(NamedTuple):
    """How well the hidden variable can be read, by step."""

    variable: str
    """Its name."""
    steps: np.ndarray
    """[S], steps of the episode that were probed."""
    accuracy: dict[str, np.ndarray]
    """[S] each, by part of the memory: share of the test episodes in which a linear probe of that part names the value;
    `OBSERVATION` is a probe of what is on the screen."""
    chance: np.ndarray
    """[S], share that naming the value most frequent in the training episodes gets right."""
    episodes: int
    """Test episodes, at the first step."""


def probe_memory(model: BaseAlgorithm, env: VecEnv, *, episodes: int, max_steps: int) -> Probe:
    """Play episodes, and probe the memory after every step for what the task calls its hidden variable.

    The agent takes its most likely actions. Half of the episodes train the probes, a ridge regression onto the values
    for each step and part, the other half tests them.

    Args:
        model: an agent with an `XLSTMPolicy`.
        env: copies of the environment, wrapped as in training; its normalisation statistics stay as they are. They say
            the value at the present observation by a method `hidden_variable()`, a whole number from 0 on, and may name
            it by an attribute `hidden_name`.
        episodes: at least; every copy plays as many.
        max_steps: of an episode; later steps are not probed.

    Raises:
        ValueError: the policy has no memory core, the task names no hidden variable, or there are too few episodes.
    """
    policy = model.policy
    if not isinstance(policy, MemoryActorCritic):
        raise ValueError(f"policy {type(policy).__name__} has no memory core: probe an agent with an XLSTMPolicy")
    try:
        env.env_method("hidden_variable", indices=0)
    except AttributeError as error:
        raise ValueError(
            "the task names no hidden variable: give its environment a method hidden_variable() that returns the value "
            "at the present observation as a whole number from 0 on"
        ) from error
    if episodes < FEWEST_EPISODES:
        raise ValueError(f"{episodes} episodes are too few for a probe; take {FEWEST_EPISODES} or more")
    with evaluating(policy), statistics_kept(unwrap_vec_normalize(env)):
        recorded = _play(model, policy, env, -(-episodes // env.num_envs), max_steps)
    try:
        variable = str(env.get_attr("hidden_name", indices=0)[0])
    except AttributeError:
        variable = "the hidden variable"
    return _probed(recorded, variable)


class _Recorded(NamedTuple):
    """Episodes in the order in which they ended."""

    values: list[list[int]]
    """By episode and step."""
    parts: list[list[dict[str, np.ndarray]]]
    """By episode and step, what a probe sees, by part: [n]."""


def _play(model: BaseAlgorithm, policy: MemoryActorCritic, env: VecEnv, rounds: int, max_steps: int) -> _Recorded:
    masked = masks_actions(env, env.action_space, getattr(model, "use_masking", False))
    copies = env.num_envs
    obs, state = reset_envs(env), policy.initial_state(copies)
    reset = torch.ones(copies, dtype=torch.bool, device=policy.device)
    values: list[list[int]] = [[] for _ in range(copies)]
    parts: list[list[dict[str, np.ndarray]]] = [[] for _ in range(copies)]
    # As many episodes of every copy: taking the first that end would prefer short ones.
    left = [rounds] * copies
    recorded = _Recorded([], [])
    while any(left):
        masks = torch.as_tensor(read_masks(env, env.action_space), device=policy.device) if masked else None
        now = env.env_method("hidden_variable")
        latents = policy.latents(obs_as_tensor(obs, policy.device), state, reset)
        state = latents.state
        seen = parts_of(state.actor) | {OBSERVATION: _flat(obs)}
        for copy in range(copies):
            if left[copy] and len(values[copy]) < max_steps:
                values[copy].append(int(now[copy]))
                parts[copy].append({name: part[copy] for name, part in seen.items()})
        action = policy.action_distribution(latents.actor, masks).get_actions(deterministic=True)
        taken = policy.to_env_actions(action.numpy(force=True).reshape(copies, *(env.action_space.shape or ())))
        obs, _, dones, _ = step_envs(env, taken, "while probing")
        for copy in np.flatnonzero(dones).tolist():
            if left[copy]:
                recorded.values.append(values[copy])
                recorded.parts.append(parts[copy])
                left[copy] -= 1
            values[copy], parts[copy] = [], []
        reset = torch.as_tensor(dones, dtype=torch.bool, device=policy.device)
    return recorded


def parts_of(state: Any) -> dict[str, np.ndarray]:
    """What a memory state consists of, as features [B, n] by name: blocks, the windows of their convolutions apart.

    A window holds the last inputs as they are: what is read from it was not remembered by the gates.
    """
    groups: dict[str, list[Tensor]] = {}
    for name, leaf in zip(leaf_names(state), leaves(state), strict=True):
        first, _, rest = name.partition(".")
        block = f"block {first}" if first.isdigit() else "memory"
        part = f"{block}, window" if rest.endswith("window") else block
        groups.setdefault(part, []).append(leaf.detach().float().flatten(1))
    joined = {name: torch.cat(group, dim=1).numpy(force=True) for name, group in groups.items()}
    return {name: part for name, part in joined.items() if part.shape[1]}


def _flat(obs: Any) -> np.ndarray:
    entries = list(obs.values()) if isinstance(obs, Mapping) else [obs]
    return np.concatenate([np.asarray(entry, np.float32).reshape(len(entry), -1) for entry in entries], axis=1)


def _probed(recorded: _Recorded, variable: str) -> Probe:
    count = len(recorded.values)
    lengths = np.array([len(values) for values in recorded.values])
    longest = max((step for step in range(lengths.max()) if (lengths > step).sum() >= FEWEST_EPISODES), default=0) + 1
    steps = np.unique(np.linspace(0, longest - 1, min(longest, MOST_STEPS)).round().astype(int))
    names = list(recorded.parts[0][0])
    accuracy = {name: np.zeros(len(steps)) for name in names}
    chance = np.zeros(len(steps))
    training = np.random.default_rng(0).permutation(count) % 2 == 0
    for place, step in enumerate(steps):
        running = np.flatnonzero(lengths > step)
        values = np.array([recorded.values[episode][step] for episode in running])
        train = training[running]
        usual = np.bincount(values[train]).argmax()
        chance[place] = (values[~train] == usual).mean()
        for name in names:
            features = np.array([recorded.parts[episode][step][name] for episode in running], np.float64)
            accuracy[name][place] = (read(features, values, train) == values[~train]).mean()
    return Probe(variable, steps, accuracy, chance, int((~training).sum()))


def read(features: np.ndarray, values: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Values of the rows that do not train, as a linear probe fitted to the others reads them.

    Args:
        features: [N, n].
        values: [N], whole numbers from 0 on.
        train: [N] bool, rows that the probe is fitted to.

    Returns:
        [number of other rows].
    """
    mean, deviation = features[train].mean(axis=0), features[train].std(axis=0)
    told = deviation > 1e-6 * (1.0 + np.abs(mean))
    scaled = (features[:, told] - mean[told]) / deviation[told]
    targets = np.eye(values.max() + 1)[values[train]]
    offset = targets.mean(axis=0)
    if not told.any():
        return np.full(int((~train).sum()), offset.argmax())
    kernel = scaled[train] @ scaled[train].T / told.sum()
    fits = []
    for ridge in RIDGES:
        inverse = np.linalg.inv(kernel + ridge * np.eye(len(kernel)))
        weights = inverse @ (targets - offset)
        # what each row would be missed by if it had been left out
        missed = weights / np.diag(inverse)[:, None]
        fits.append((float((missed**2).sum()), weights))
    weights = min(fits, key=lambda fit: fit[0])[1]
    scores = scaled[~train] @ (scaled[train].T @ weights) / told.sum() + offset
    return np.asarray(scores.argmax(axis=1))


def draw_probes(probes: Sequence[tuple[str, Probe]], path: Path) -> None:
    """Draw probes side by side.

    Args:
        probes: with a title each.
        path: the PNG to write; replaced whole.
    """
    # Loaded here because most uses of the package never draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.0 + 6.0 * len(probes), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(probes), sharey=True, squeeze=False)[0]
    for panel, (title, probe) in zip(panels, probes, strict=True):
        for name, accuracy in probe.accuracy.items():
            style = {"color": "grey", "linestyle": ":"} if name == OBSERVATION else {"marker": ".", "linewidth": 1.6}
            panel.plot(probe.steps, accuracy, label=name, **style)
        panel.plot(probe.steps, probe.chance, color="black", linestyle="--", linewidth=1.0, label="chance")
        panel.set_title(title, fontsize="medium")
        panel.set_xlabel("step of the episode")
        panel.set_ylim(0.0, 1.03)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small", loc="lower left")
    panels[0].set_ylabel("share of test episodes read right")
    figure.suptitle(f"Read from the memory by a linear probe: {probes[0][1].variable}", fontweight="bold")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())
