"""NaN and infinity are named with their place and never reach the weights."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from tests.agents.small_agents import agent
from xlstm_rl.agents import RecurrentPPO
from xlstm_rl.vec_envs.env_contract import SKIPPED, check_step, rewards_without_skipped, skipped_steps

# what NumPy says of it inside VecNormalize
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


class Faulty(gym.Env[Any, np.int64]):
    """In the second environment something is wrong at one step of its life."""

    made = 0

    def __init__(self, what: str, value: float, at: int = 5) -> None:
        box = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.observation_space: Any = spaces.Dict({"a": box}) if what == "dict" else box
        self.action_space = spaces.Discrete(2)
        self.what, self.value, self.at = what, value, at
        self.index, self.steps = Faulty.made % 3, 0
        Faulty.made += 1

    def observe(self, value: float = 0.5) -> Any:
        obs = np.array([0.5, value], np.float32)
        return {"a": obs} if self.what == "dict" else obs

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self.observe(), {}

    def step(self, action: np.int64) -> Any:
        self.steps += 1
        wrong = self.index == 1 and self.steps == self.at
        value = self.value if wrong else 0.5
        reward = value if self.what == "reward" else float(action)
        final = wrong and self.what == "final"
        return self.observe(0.5 if self.what == "reward" else value), reward, final, False, {}


def faulty(what: str, value: float = np.nan) -> Any:
    Faulty.made = 0
    return make_vec_env(Faulty, 3, env_kwargs={"what": what, "value": value})


def learner(env: Any, **kwargs: Any) -> RecurrentPPO:
    policy = "MultiInputXLSTMPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpXLSTMPolicy"
    return agent(env=env, policy=policy, **kwargs)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("what", "quantity"),
    [
        ("observation", r"observation of environment 1 is {} at index \[1\]"),
        ("dict", r"observation of environment 1 is {} under the key 'a' at index \[1\]"),
        ("final", r"final observation of environment 1 is {} at index \[1\]"),
        ("reward", "reward of environment 1 is {}"),
    ],
)
def test_place_of_the_fault_is_named(what: str, quantity: str, value: float) -> None:
    message = quantity.format(value) + r" in step 4 of the rollout \(15 steps into the run\)"
    with pytest.raises(FloatingPointError, match=message):
        learner(faulty(what, value)).learn(24)


def test_fault_behind_a_normaliser_is_named_as_the_environment_gave_it() -> None:
    env = VecNormalize(faulty("observation", np.inf), norm_reward=False)
    told = r"observation of environment 1 is inf.*; mend .* or drop such rollouts with on_nonfinite='skip'"
    with pytest.raises(FloatingPointError, match=told):
        learner(env).learn(24)


def test_first_observation_is_checked() -> None:
    env = faulty("observation")
    model = learner(env)
    env.envs[2].unwrapped.observe = lambda value=0.5: np.array([np.nan, 0.5], np.float32)
    with pytest.raises(FloatingPointError, match=r"environment 2 is nan at index \[0\] before the rollout"):
        model.learn(24)


@pytest.mark.parametrize("what", ["observation", "dict", "reward"])
@pytest.mark.parametrize("normalize", [False, True])
def test_broken_rollout_can_be_skipped(what: str, normalize: bool) -> None:
    env = VecNormalize(faulty(what)) if normalize else faulty(what)
    model = learner(env, on_nonfinite="skip")
    with pytest.warns(UserWarning, match="environment 1.* is nan .*the rollout is dropped"):
        model.learn(15)
    assert model._n_updates == 0
    model.learn(24, reset_num_timesteps=False)
    assert model._n_updates == 1
    assert all(bool(weight.isfinite().all()) for weight in model.policy.parameters())


class FaultyStarts(gym.Env[Any, np.int64]):
    """The first observation of some episodes is NaN."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, broken: tuple[int, ...]) -> None:
        self.broken, self.resets, self.steps = broken, 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        broken = self.resets in self.broken
        self.resets, self.steps = self.resets + 1, 0
        return np.array([np.nan if broken else 0.5, 0.5], np.float32), {}

    def step(self, action: np.int64) -> Any:
        self.steps += 1
        return np.array([0.5, self.steps], np.float32), 1.0, self.steps == 5, False, {}


@pytest.mark.parametrize("normalize", [False, True])
# the very first reset, one within a rollout, and one that is the answer to a broken one
@pytest.mark.parametrize("broken", [(0,), (2,), (0, 1, 2), (2, 3)])
def test_broken_first_observation_can_be_skipped(broken: tuple[int, ...], normalize: bool) -> None:
    # seeding resets once more
    env: Any = make_vec_env(FaultyStarts, 1, env_kwargs={"broken": broken})
    env = VecNormalize(env) if normalize else env
    model = learner(env, on_nonfinite="skip", n_steps=8, batch_size=8)
    with pytest.warns(UserWarning, match="environment 0 is nan"):
        model.learn(40)
    assert model._n_updates > 0
    assert all(bool(weight.isfinite().all()) for weight in model.policy.parameters())
    if normalize:
        assert np.isfinite(env.obs_rms.mean).all() and np.isfinite(env.obs_rms.var).all()


def test_environment_that_only_starts_broken_is_not_reset_for_ever() -> None:
    model = learner(make_vec_env(FaultyStarts, 1, env_kwargs={"broken": range(1000)}), on_nonfinite="skip")
    with (
        pytest.warns(UserWarning, match="all environments start other episodes"),
        pytest.raises(FloatingPointError, match="after 10 resets in a row: mend the environment"),
    ):
        model.learn(24)


class Interrupted(gym.Env[Any, np.int64]):
    """Observes its steps; Ctrl-C comes in one of them."""

    observation_space = spaces.Box(0, 100, (1,), np.float32)
    action_space = spaces.Discrete(2)
    steps = total = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: np.int64) -> Any:
        self.steps, self.total = self.steps + 1, self.total + 1
        if self.total == 6:
            raise KeyboardInterrupt
        return np.full(1, self.steps, np.float32), 1.0, False, False, {}


def test_memory_sees_no_observation_twice_after_an_exception() -> None:
    model = agent(env=make_vec_env(Interrupted, 1), n_steps=4, batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        model.learn(8)
    model.learn(4, reset_num_timesteps=False)
    buffer = model.rollout_buffer
    # a new episode, with an empty memory
    assert buffer.observations[:, 0, 0].tolist() == [0, 1, 2, 3]
    assert buffer.episode_starts[:, 0].tolist() == [True, False, False, False]


def exploding(model: RecurrentPPO) -> RecurrentPPO:
    """The loss is NaN in every second minibatch."""
    loss, calls = model._loss, [0]

    def spoiled(batch: Any, total_weight: Any = None) -> Any:
        calls[0] += 1
        parts, terms = loss(batch, total_weight)
        if calls[0] % 2:
            parts = parts._replace(total=parts.total * np.nan, value=parts.value * np.nan)
        return parts, terms

    model._loss = spoiled  # type: ignore[method-assign]
    return model


def test_loss_that_is_not_finite_is_named() -> None:
    model = exploding(agent())
    before = [weight.clone() for weight in model.policy.parameters()]
    with pytest.raises(FloatingPointError, match=r"the loss \(total, value\) in minibatch 0 of epoch 0: .*norm is nan"):
        model.learn(24)
    assert all(map(torch.equal, before, model.policy.parameters()))


def test_update_with_a_loss_that_is_not_finite_can_be_skipped() -> None:
    model = exploding(agent(on_nonfinite="skip"))
    with pytest.warns(UserWarning, match="this update is skipped"):
        model.learn(24)
    assert all(bool(weight.isfinite().all()) for weight in model.policy.parameters())
    assert model.logger.name_to_value["train/skipped_updates"] == 1


@pytest.mark.parametrize("blocks", ["m", "s", "lstm", "gru", "transformer", "ssm", "rwkv", "none"])
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_spoilt_sequence_of_one_environment_is_told_and_reaches_no_weight(blocks: str, on_nonfinite: Any) -> None:
    """Whoever writes into the rollout after it was checked, as callbacks may."""
    memory = "xlstm" if len(blocks) == 1 else blocks
    kwargs = {"memory": memory, "memory_kwargs": {"hidden_size": 8} | ({"blocks": blocks} if memory == "xlstm" else {})}
    model = agent(policy_kwargs=kwargs, on_nonfinite=on_nonfinite, steps=24, n_epochs=2)
    model.rollout_buffer.observations[3, 1] = np.nan
    if on_nonfinite == "stop":
        with pytest.raises(FloatingPointError, match="the loss .* in minibatch [01] of epoch 0"):
            model.train()
    else:
        with pytest.warns(UserWarning, match=r"the loss \(.*this update is skipped"):
            model.train()
        # that minibatch of every epoch, not the one without
        assert model.logger.name_to_value["train/skipped_updates"] == 2
    assert all(bool(weight.isfinite().all()) for weight in model.policy.parameters())


def test_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match="on_nonfinite='ignore' must be 'stop' or 'skip'"):
        agent(on_nonfinite="ignore")


def test_lost_step_has_no_advantage() -> None:
    rewards, values = np.array([1.0, 2.0]), np.array([5.0, 7.0], np.float32)
    assert rewards_without_skipped(rewards, values, skipped_steps([{}, {SKIPPED: "died"}])).tolist() == [1.0, 7.0]
    assert rewards_without_skipped(rewards, values, skipped_steps([{}, {}])) is rewards


def test_whole_numbers_are_not_searched() -> None:
    env = faulty("reward")
    check_step(env, np.zeros((3, 2), np.uint8), np.zeros(3), [{}] * 3, "in step 0")
