"""A step of an exported policy beside the policy itself, whatever the file it was exported to."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import obs_as_tensor

from xlstm_rl.agents.actor_critic import evaluating
from xlstm_rl.agents.heads import mask_parts
from xlstm_rl.export.onnx_file import ExportError, masks_wanted, memory_policy
from xlstm_rl.export.preprocessing import SINGLE, as_seen, entries, front_of
from xlstm_rl.export.step_graph import MASK, NEXT, RESET, observation_name
from xlstm_rl.memory import leaf_names, leaves

# Beyond this it is another function. Rounding alone gives 1e-6, and up to 1e-4 where norms in the network amplify it.
TOLERANCE = 1e-3
ROWS = 3
RESET_PROBABILITY, MASK_PROBABILITY = 0.05, 0.3


class Check(NamedTuple):
    """How an exported policy compares with the policy."""

    largest_error: float
    """Of any output in any step, relative to the largest value of that output where that is above 1."""
    step_seconds: float
    """Median duration of a step of `ROWS` environments in the runtime."""
    same_actions: float | None
    """Share of the chosen actions that are the same; None of Box actions, which are not chosen."""


class StepRunner(Protocol):
    """Runs steps of an exported policy for `ROWS` environments."""

    inputs: set[str]
    """Names of what it takes, memory states among them unless it keeps those itself."""

    def run(self, fed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs [ROWS, ...] by name -> outputs [ROWS, ...] by name, the next memory states among them."""


class _Given(NamedTuple):
    """What a step of both is given, [ROWS, ...] each."""

    observations: Any
    reset: np.ndarray
    action_mask: np.ndarray | None


def compare_steps(
    model: BaseAlgorithm,
    runner: StepRunner,
    *,
    action_masks: bool | None,
    n_steps: int,
    seed: int,
    tolerance: float | None = TOLERANCE,
) -> Check:
    """Run an exported policy beside torch with random observations, resets and masks.

    Each goes on from its own memory state, so that errors may add up. Torch does what it does in training and
    evaluation: the wrappers of the environment in NumPy, compiled kernels where there are any.

    Args:
        model: the agent that was exported.
        runner: of the exported policy.
        action_masks: as for `export_onnx`.
        n_steps: steps to compare.
        seed: of observations, resets and masks.
        tolerance: largest error that is allowed, in units of `Check.largest_error`; None: any that is a number.

    Raises:
        ExportError: an output is off by more than that; the message names it and the step.
    """
    policy, env = memory_policy(model), model.get_env()
    state = policy.initial_state(ROWS)
    named = zip(leaf_names(state), leaves(state), strict=True)
    fed: dict[str, Any] = {name: leaf.numpy(force=True) for name, leaf in named if name in runner.inputs}
    space = front_of(env, policy.observation_space).space
    masked = policy.action_space if masks_wanted(model, action_masks) else None
    worst, seconds, same = 0.0, [], []
    with evaluating(policy):
        for index, given in enumerate(_draw(space, masked, n_steps, seed)):
            fed |= _named(given)
            # not those that the critic alone sees
            fed = {name: part for name, part in fed.items() if name in runner.inputs}
            start = time.perf_counter()
            got = runner.run(fed)
            seconds.append(time.perf_counter() - start)
            fed |= {name.removeprefix(NEXT): part for name, part in got.items() if name.startswith(NEXT)}
            masks = None if given.action_mask is None else torch.from_numpy(given.action_mask).to(policy.device)
            step = policy.act(
                obs_as_tensor(as_seen(env, given.observations), policy.device),
                state,
                torch.from_numpy(given.reset).to(policy.device),
                deterministic=True,
                action_masks=masks,
            )
            state = step.state
            expected = {
                NEXT + name: leaf.numpy(force=True) for name, leaf in zip(leaf_names(state), leaves(state), strict=True)
            }
            expected["value"] = step.values.numpy(force=True)
            errors = {name: _error(got[name], part) for name, part in expected.items() if name in got}
            actions = policy.to_env_actions(step.actions.numpy(force=True))
            errors["action"] = _action_error(policy.action_space, got, actions)
            same.append(float(np.mean(np.reshape(got["action"] == actions, (ROWS, -1)).all(1))))
            name = max(errors, key=lambda name: errors[name])
            # not "above": NaN is above nothing
            if not errors[name] <= (float("inf") if tolerance is None else tolerance):
                raise ExportError(f"{name} of the exported policy is off by {errors[name]:.1e} in step {index}")
            worst = max(worst, errors[name])
    chosen = not isinstance(policy.action_space, spaces.Box)
    return Check(worst, statistics.median(seconds), statistics.fmean(same) if chosen else None)


def _draw(space: spaces.Space[Any], masked: spaces.Space[Any] | None, n_steps: int, seed: int) -> Iterator[_Given]:
    """Random steps; the first starts episodes everywhere."""
    # the generator of the environment's own space is none of our business
    space = copy.deepcopy(space)
    space.seed(seed)
    rng = np.random.default_rng(seed)
    for index in range(n_steps):
        parts = {
            key: np.stack([np.asarray(part.sample(), part.dtype) for _ in range(ROWS)])
            for key, part in entries(space).items()
        }
        mask = None
        if masked is not None:
            mask = rng.random((ROWS, sum(mask_parts(masked)))) > MASK_PROBABILITY
            # the first choice of every component, so that there is one
            mask[:, np.cumsum([0, *mask_parts(masked)[:-1]])] = True
        reset = rng.random(ROWS) < (1.0 if index == 0 else RESET_PROBABILITY)
        yield _Given(parts.get(SINGLE, parts), reset, mask)


def _named(given: _Given) -> dict[str, np.ndarray]:
    parts = given.observations if isinstance(given.observations, dict) else {SINGLE: given.observations}
    named = {observation_name(key): part for key, part in parts.items()}
    mask = {} if given.action_mask is None else {MASK: given.action_mask}
    return {**named, RESET: given.reset, **mask}


def _error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / max(1.0, np.abs(expected).max()))


def _action_error(space: spaces.Space[Any], got: dict[str, np.ndarray], expected: np.ndarray) -> float:
    """Of a Box action its error; of a chosen one how much likelier, in logits, the choice of the other was."""
    action = got["action"]
    if isinstance(space, spaces.Box):
        return _error(action, expected)
    logits = got["logits"]
    if isinstance(space, spaces.MultiBinary):
        return float(np.abs(logits[action != expected]).max(initial=0.0))
    assert isinstance(space, spaces.Discrete | spaces.MultiDiscrete), "others have no list of choices"
    action, expected = action - space.start, expected - space.start
    gaps = []
    for index, part in enumerate(np.split(logits, np.cumsum(mask_parts(space))[:-1], axis=-1)):
        chosen, other = (np.reshape(choice, (ROWS, -1))[:, index, None] for choice in (action, expected))
        gaps.append(np.take_along_axis(part, chosen, 1) - np.take_along_axis(part, other, 1))
    return float(np.abs(gaps).max())
