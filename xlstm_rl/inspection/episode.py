"""One episode of an agent with everything that its memory did."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from torch import Tensor

from xlstm_rl.agents.actor_critic import MemoryActorCritic, evaluating
from xlstm_rl.agents.evaluation import plays_in
from xlstm_rl.agents.heads import masks_actions, read_masks
from xlstm_rl.agents.training_state import statistics_kept
from xlstm_rl.kernels import KernelCall, MLSTMCall, recorded_calls
from xlstm_rl.memory import leaf_names, leaves, map_leaves
from xlstm_rl.vec_envs.env_contract import first_image, render_mode, reset_envs, step_envs

# Entries of an observation with more numbers are not drawn.
LARGEST_ENTRY = 64


class Episode(NamedTuple):
    """An episode of T steps."""

    observations: np.ndarray
    """[T, n], flat, without images and other large entries."""
    labels: list[str]
    """[n], of the observations."""
    actions: np.ndarray
    """[T, k], as the environment took them, flat."""
    choices: np.ndarray | None
    """[T, c], probabilities of all choices of all components of an action; None for Box actions."""
    starts: np.ndarray
    """[k], the action that stands for the first choice of each component; 0 but for spaces with a `start`."""
    rewards: np.ndarray
    """[T], as the agent is paid: normalised, if it is trained so."""
    total: float
    """Sum of the rewards as the environment paid them."""
    values: np.ndarray
    """[T], what the critic expects, in the same units."""
    state_norms: dict[str, np.ndarray]
    """[T, H] after every step: of a matrix memory the logarithm to base 10 of its norm by head, of an sLSTM the root
    mean square of its content by head, of other memories [T, 1] of every part of the state."""
    blocks: list[KernelCall]
    """What the kernels of the actor's memory did, T steps each; empty for memories other than xLSTM."""
    frames: list[np.ndarray]
    """[height, width, 3] each, before every step, and after the last one where the episode was cut: once it has ended,
    the environment has started another. Empty where the environment draws none."""
    ended: str
    """"terminated", "truncated" or "cut" at the largest number of steps."""


def record_episode(model: BaseAlgorithm, env: VecEnv, *, max_steps: int, deterministic: bool = True) -> Episode:
    """Play one episode and note everything.

    The memory runs in its torch forms, which compute what the compiled ones do.

    Args:
        model: an agent with an `XLSTMPolicy`.
        env: one copy of the environment, wrapped as in training; its normalisation statistics stay as they are.
        max_steps: the episode is cut there; reads and pictures grow with the square of it.
        deterministic: the mode of the policy instead of a sample.

    Raises:
        ValueError: the policy has no memory core, `env` has several copies, or `max_steps` is below 1.
    """
    policy = model.policy
    if not isinstance(policy, MemoryActorCritic):
        raise ValueError(f"policy {type(policy).__name__} has no memory core: inspect an agent with an XLSTMPolicy")
    if env.num_envs != 1 or max_steps < 1:
        raise ValueError(f"an episode needs 1 environment and a step, got {env.num_envs} and max_steps={max_steps}")
    with evaluating(policy), statistics_kept(unwrap_vec_normalize(env)):
        episode = _play(model, policy, env, max_steps, deterministic)
    if plays_in(model, env):
        # its episodes are over: the next `learn` begins new ones, with an empty memory
        model._last_obs = None
    return episode


def _play(model: BaseAlgorithm, policy: MemoryActorCritic, env: VecEnv, max_steps: int, deterministic: bool) -> Episode:
    masked = masks_actions(env, env.action_space, getattr(model, "use_masking", False))
    normalizer = unwrap_vec_normalize(env)
    obs, reset, state = reset_envs(env), torch.ones(1, dtype=torch.bool, device=policy.device), policy.initial_state(1)
    steps: list[dict[str, Any]] = []
    calls: list[list[KernelCall]] = []
    first = first_image(env) if render_mode(env) == "rgb_array" else None
    frames = [] if first is None else [first]
    ended = "cut"
    while len(steps) < max_steps:
        masks = torch.as_tensor(read_masks(env, env.action_space), device=policy.device) if masked else None
        seen = _flat(env, obs)
        with recorded_calls() as recorded:
            latents = policy.latents(obs_as_tensor(obs, policy.device), state, reset)
            state = latents.state
            distribution = policy.action_distribution(latents.actor, masks)
            action = distribution.get_actions(deterministic=deterministic)
            value = float(policy.value_net(latents.critic))
        taken = policy.to_env_actions(action.numpy(force=True).reshape(1, *(env.action_space.shape or ())))
        obs, rewards, dones, infos = step_envs(env, taken, f"in step {len(steps)} of the episode")
        # the critic's blocks run after as many of the actor's
        calls.append(recorded if policy.memory_critic is None else recorded[: len(recorded) // 2])
        paid = rewards if normalizer is None else normalizer.get_original_reward()
        norms = _norms(state.actor, calls[-1])
        choices = _probabilities(distribution)
        steps.append(
            {
                "obs": seen,
                "action": np.ravel(taken),
                "choices": choices,
                "reward": rewards[0],
                "paid": float(paid[0]),
                "value": value,
                "norms": norms,
            }
        )
        reset = torch.zeros_like(reset)
        if dones[0]:
            ended = "truncated" if infos[0].get("TimeLimit.truncated") else "terminated"
            break
        if first is not None:
            frames += [image for image in [first_image(env)] if image is not None]
    return _joined(steps, calls, frames, ended, env)


def _joined(
    steps: list[dict[str, Any]], calls: list[list[KernelCall]], frames: list[np.ndarray], ended: str, env: VecEnv
) -> Episode:
    def column(name: str) -> np.ndarray:
        return np.stack([np.asarray(step[name], np.float64) for step in steps])

    return Episode(
        observations=column("obs"),
        labels=_labels(env),
        actions=column("action"),
        choices=None if steps[0]["choices"] is None else column("choices"),
        starts=np.broadcast_to(np.ravel(getattr(env.action_space, "start", 0)), steps[0]["action"].shape),
        rewards=column("reward"),
        total=sum(step["paid"] for step in steps),
        values=column("value"),
        state_norms={name: np.stack([step["norms"][name] for step in steps]) for name in steps[0]["norms"]},
        blocks=[_one_call(parts) for parts in zip(*calls, strict=True)],
        frames=frames,
        ended=ended,
    )


def _one_call(parts: tuple[KernelCall, ...]) -> KernelCall:
    """Calls of one step each, one after the other, as one call."""

    def over_time(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts], dim=1)

    first = parts[0]
    final: Any = parts[-1].final
    # the first step of the episode emptied it
    empty: Any = map_leaves(torch.zeros_like, first.state)
    hidden: Any = over_time("hidden")
    if isinstance(first, MLSTMCall):
        given: Any = {name: over_time(name) for name in ("q", "k", "v", "input_gate", "forget_gate")}
    else:
        given = {"gates": over_time("gates")}
    return first._replace(**given, state=empty, reset=None, hidden=hidden, final=final)


def _norms(state: Any, calls: list[KernelCall]) -> dict[str, np.ndarray]:
    """Sizes [H] of what is remembered, by name."""
    if calls:
        return {f"block {index}": _norm(call) for index, call in enumerate(calls)}
    named = zip(leaf_names(state), leaves(state), strict=True)
    return {
        name: leaf.double().square().mean().sqrt().reshape(1).numpy(force=True) for name, leaf in named if leaf.numel()
    }


def _norm(call: KernelCall) -> np.ndarray:
    if isinstance(call, MLSTMCall):
        norm = call.final.cell[0].double().flatten(1).norm(dim=1).log() + call.final.stabilizer[0].double()
        return np.asarray((norm / np.log(10)).clamp(min=-12.0).numpy(force=True))
    content = call.final.cell[0].double() / call.final.normalizer[0].double()
    return content.square().mean(-1).sqrt().numpy(force=True)


def _probabilities(distribution: Any) -> np.ndarray | None:
    """Of all choices of an action; None for a Gaussian."""
    inner: Any = getattr(distribution, "distributions", None) or getattr(distribution, "distribution", None)
    parts = inner if isinstance(inner, list) else [inner]
    probs = [part.probs for part in parts if hasattr(part, "probs")]
    return torch.cat([part[0] for part in probs]).numpy(force=True) if probs else None


def _flat(env: VecEnv, obs: Any) -> np.ndarray:
    """The small entries of an observation as the environment gave it, [n]."""
    normalizer = unwrap_vec_normalize(env)
    if normalizer is not None:
        obs = normalizer.get_original_obs()
    parts = obs if isinstance(obs, dict) else {"": obs}
    flat = [spaces.flatten(part, parts[key][0]) for key, part in _small_entries(env).items()]
    return np.concatenate([np.zeros(0), *flat])


def _labels(env: VecEnv) -> list[str]:
    return [
        f"{key} {index}".strip() if spaces.flatdim(part) > 1 else key
        for key, part in _small_entries(env).items()
        for index in range(spaces.flatdim(part))
    ]


def _small_entries(env: VecEnv) -> dict[str, spaces.Space[Any]]:
    """Of the observation as `_flat` tells it; one that is no Dict has the key ""."""
    normalizer = unwrap_vec_normalize(env)
    # wrappers further out change neither what it saw nor what is drawn
    space = (env if normalizer is None else normalizer).observation_space
    parts = dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}
    return {key: part for key, part in parts.items() if spaces.flatdim(part) <= LARGEST_ENTRY}
