"""One policy serves many threads: what each gets is what it would get alone."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from tests.agents.small_agents import agent
from xlstm_rl.agents import RecurrentPPO

THREADS, STEPS = 4, 60
HEADS: dict[str, dict[str, Any]] = {
    "discrete": {"action": "discrete"},
    "box": {"action": "box"},
    "multi-discrete": {"action": "multi-discrete"},
    "multi-binary": {"action": "multi-binary"},
    "gSDE": {"action": "box", "use_sde": True},
    "squashed gSDE": {"action": "box", "use_sde": True, "policy_kwargs": {"squash_output": True}},
    "dict": {"observation": "dict"},
    "s": {"policy_kwargs": {"memory_kwargs": {"hidden_size": 8, "num_heads": 2, "blocks": "s"}}},
    "ms": {"policy_kwargs": {"memory_kwargs": {"hidden_size": 8, "num_heads": 2, "blocks": "ms"}}},
    "lstm": {"policy": "MlpLstmPolicy", "policy_kwargs": {"memory_kwargs": {"hidden_size": 8}}},
    "separate critic": {"policy_kwargs": {"critic_memory": "separate"}},
}


def session(model: RecurrentPPO, number: int, *, masked: bool = False) -> list[np.ndarray]:
    """Actions and states of one caller, who keeps the state."""
    rng = np.random.default_rng(number)
    space = model.observation_space
    kinds = space.spaces if isinstance(space, spaces.Dict) else {"": space}
    seen: list[np.ndarray] = []
    state = None
    for step in range(STEPS):
        drawn = {key: np.asarray(rng.integers(0, 2, part.shape)).astype(part.dtype) for key, part in kinds.items()}
        if "" in drawn:
            drawn[""] = rng.uniform(-1, 1, space.shape or ()).astype(np.float32)
        obs: Any = drawn if isinstance(space, spaces.Dict) else drawn[""]
        masks = np.eye(3, dtype=bool)[(number + step) % 3] if masked else None
        action, state = model.predict(
            obs, state=state, episode_start=np.array([step == 0]), deterministic=True, action_masks=masks
        )
        seen += [np.asarray(action), *state]  # type: ignore[misc]
    return seen


def together(work: Callable[[int], list[np.ndarray]]) -> list[list[np.ndarray]]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(work, range(THREADS)))
    finally:
        sys.setswitchinterval(interval)


def assert_equal_sessions(work: Callable[[int], list[np.ndarray]]) -> None:
    alone = [work(number) for number in range(THREADS)]
    for ours, theirs in zip(together(work), alone, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("head", HEADS)
def test_threads_that_share_a_policy_get_what_they_would_get_alone(head: str) -> None:
    model = agent(**HEADS[head])
    assert_equal_sessions(lambda number: session(model, number))


def test_threads_with_masks_get_what_they_would_get_alone() -> None:
    model = agent()
    assert_equal_sessions(lambda number: session(model, number, masked=True))


@pytest.mark.parametrize(
    ("head", "masked"),
    [
        *((head, False) for head in ("discrete", "box", "multi-discrete", "multi-binary", "gSDE")),
        *((head, True) for head in ("discrete", "multi-discrete", "multi-binary")),
    ],
)
def test_a_distribution_stays_what_it_was_when_another_is_asked_for(head: str, masked: bool) -> None:
    policy = agent(**HEADS[head]).policy
    state = (torch.zeros(1, 1, policy.lstm_actor.hidden_size),) * 2
    size = {"discrete": 3, "multi-discrete": 5, "multi-binary": 6}.get(head, 0)
    masks = torch.ones(1, size, dtype=torch.bool) if masked else None
    first, _ = policy.get_distribution(torch.tensor([[1.0, 0.0, 0.0]]), state, torch.ones(1), masks)
    action = first.mode()
    before = first.log_prob(action).clone()
    second, _ = policy.get_distribution(torch.tensor([[-1.0, 0.5, 0.2]]), state, torch.ones(1), masks)
    assert first is not second
    assert torch.equal(first.log_prob(action), before)
    assert not torch.equal(second.log_prob(action), before)


@pytest.mark.parametrize("blocks", ["m", "s", "sm"])
def test_threads_that_let_their_states_be_written_over_get_what_they_would_get_alone(blocks: str) -> None:
    policy = agent(policy_kwargs={"memory_kwargs": {"hidden_size": 8, "num_heads": 2, "blocks": blocks}}).policy

    def work(number: int) -> list[np.ndarray]:
        generator = torch.Generator().manual_seed(number)
        state, seen = policy.initial_state(2), []
        for step in range(STEPS):
            obs = torch.rand(2, 3, generator=generator)
            reset = torch.tensor([step == 0, step % 7 == 0])
            with torch.no_grad():
                result = policy.act(obs, state, reset, deterministic=True, reuse_state=True)
            state = result.state
            seen += [result.actions.numpy(), result.values.numpy(), result.log_prob.numpy()]
        return seen

    assert_equal_sessions(work)
