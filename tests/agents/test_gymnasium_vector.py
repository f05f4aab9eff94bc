"""Vector environments of gymnasium: whatever their autoreset, no observation belongs to the wrong episode."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers.vector import NormalizeObservation, RecordEpisodeStatistics, TransformReward
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from xlstm_rl.agents import GymnasiumVecEnv, RecurrentPPO, evaluate
from xlstm_rl.vec_envs.env_contract import SKIPPED

# generic classes, and wrappers that refuse modes, came later
GYMNASIUM = tuple(map(int, gym.__version__.split(".")[:2]))
MODES = [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED]


class Ledger(gym.Env[Any, Any]):
    """Observations tell the episode and the step; the length of an episode is random, and every third is cut."""

    observation_space = spaces.Box(0, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self.episode = -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        self.length = int(self.np_random.integers(1, 6))
        return np.array([self.episode, 0], np.float32), {"begun": self.episode}

    def step(self, action: int) -> Any:
        self.t += 1
        over, cut = self.t == self.length, self.episode % 3 == 2
        info = {"left": self.length - self.t, "note": f"{self.episode}/{self.t}"}
        return np.array([self.episode, self.t], np.float32), float(action), over and not cut, over and cut, info


class NativeLedger(VectorEnv[Any, Any, Any]):
    """The same, many at once, reset in the step after the last one and knowing no reset masks, as CartPole's own is."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, num_envs: int) -> None:
        self.parts = SyncVectorEnv([Ledger] * num_envs, autoreset_mode=AutoresetMode.NEXT_STEP)
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = Ledger.observation_space, Ledger.action_space
        self.observation_space, self.action_space = self.parts.observation_space, self.parts.action_space
        self.render_mode = None

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        assert not options
        return self.parts.reset(seed=seed)

    def step(self, actions: Any) -> Any:
        return self.parts.step(actions)


def vector(mode: AutoresetMode, n: int = 3) -> GymnasiumVecEnv:
    return GymnasiumVecEnv(SyncVectorEnv([Ledger] * n, autoreset_mode=mode))


def play(env: Any, steps: int) -> list[Any]:
    """Everything that is seen in some steps of seeded play."""
    rng = np.random.default_rng(0)
    env.seed(7)
    seen: list[Any] = [env.reset()]
    for _ in range(steps):
        obs, rewards, dones, infos = env.step(rng.integers(2, size=env.num_envs))
        told = ("terminal_observation", "TimeLimit.truncated", "left", "note")
        infos = [{key: np.asarray(info[key]).tolist() for key in told if key in info} for info in infos]
        infos = [{"TimeLimit.truncated": False} | info for info in infos]
        seen.append((obs, rewards, dones, infos))
    return seen


def assert_same(actual: list[Any], expected: list[Any]) -> None:
    np.testing.assert_array_equal(actual[0], expected[0])
    for (obs, rewards, dones, infos), others in zip(actual[1:], expected[1:], strict=True):
        for array, other in zip((obs, rewards, dones), others[:3], strict=True):
            np.testing.assert_array_equal(array, other)
        for info, other in zip(infos, others[3], strict=True):
            assert {"TimeLimit.truncated": False} | info == other


@pytest.mark.parametrize("mode", MODES)
def test_steps_equal_those_of_stable_baselines(mode: AutoresetMode) -> None:
    assert_same(play(vector(mode), 60), play(DummyVecEnv([Ledger] * 3), 60))


@pytest.mark.parametrize("mode", MODES)
def test_processes_of_gymnasium_step_the_same(mode: AutoresetMode) -> None:
    env = GymnasiumVecEnv(AsyncVectorEnv([Ledger] * 2, autoreset_mode=mode))
    try:
        assert_same(play(env, 25), play(DummyVecEnv([Ledger] * 2), 25))
    finally:
        env.close()


def test_steps_that_only_reset_belong_to_no_episode() -> None:
    env = GymnasiumVecEnv(NativeLedger(3))
    obs: Any = env.reset()
    episodes: list[list[Any]] = [[] for _ in range(3)]
    running = [[row.tolist()] for row in obs]
    for _ in range(80):
        obs, rewards, dones, infos = env.step(np.ones(3, int))
        for row in range(3):
            if SKIPPED in infos[row]:
                assert dones[row] and rewards[row] == 0 and "episode" not in infos[row]
                running[row] = [obs[row].tolist()]
            elif dones[row]:
                running[row].append(infos[row]["terminal_observation"].tolist())
                assert infos[row]["episode"]["l"] == infos[row]["episode"]["r"] == len(running[row]) - 1
                episodes[row].append(running[row])
            else:
                running[row].append(obs[row].tolist())
    for row in range(3):
        assert len(episodes[row]) > 5
        for number, episode in enumerate(episodes[row]):
            assert episode == [[number, t] for t in range(len(episode))]


@pytest.mark.parametrize("mode", [*MODES, None])
def test_rollouts_start_episodes_where_they_start(mode: AutoresetMode | None) -> None:
    env: Any = NativeLedger(3) if mode is None else SyncVectorEnv([Ledger] * 3, autoreset_mode=mode)
    model = RecurrentPPO("MlpXLSTMPolicy", env, n_steps=32, batch_size=32, n_epochs=1, seed=0)
    model.learn(32 * 3 * 2)
    buffer = model.rollout_buffer
    first = buffer.observations[..., 1] == 0
    assert (buffer.episode_starts == (first | buffer.skipped)).all()
    assert buffer.skipped.any() == (mode is None)
    assert (buffer.advantages[buffer.skipped] == 0).all()
    weights = buffer.chunks(torch.zeros(32, 3)).weights
    assert torch.equal(weights == 0, torch.from_numpy(buffer.skipped.T))
    assert all(info["l"] <= 5 for info in model.ep_info_buffer or ())


class Paying(gym.Env[Any, Any]):
    """Pays 1 a step for a fixed number of steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, length: int) -> None:
        self.length = length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> Any:
        self.t += 1
        return np.full(1, self.t, np.float32), 1.0, self.t == self.length, False, {}


def paying(mode: AutoresetMode) -> Any:
    return SyncVectorEnv([lambda: Paying(3), lambda: Paying(5)], autoreset_mode=mode)


def paid(env: VectorEnv[Any, Any, Any]) -> RecurrentPPO:
    """A model that trained in the environment; all its episodes pay as long as they last."""
    model = RecurrentPPO("MlpXLSTMPolicy", env, n_steps=32, batch_size=32, n_epochs=1, seed=0).learn(64)
    episodes = list(model.ep_info_buffer or ())
    assert {(info["r"], info["l"]) for info in episodes} == {(3, 3), (5, 5)}
    result = evaluate(model, env, 8, seed=0)
    assert sorted(result.returns) == sorted(result.lengths) == [3, 3, 3, 3, 5, 5, 5, 5]
    return model


@pytest.mark.parametrize("mode", MODES)
def test_episodes_are_counted_right_under_a_wrapper_that_counts_them(mode: AutoresetMode) -> None:
    paid(RecordEpisodeStatistics(paying(mode)))


def test_the_counters_of_a_wrapper_stay_right_where_environments_reset_themselves() -> None:
    env = RecordEpisodeStatistics(paying(AutoresetMode.NEXT_STEP))
    paid(env)
    assert set(env.return_queue) == {3, 5}


def test_observations_are_normalised_by_the_wrapper_of_gymnasium() -> None:
    model = paid(NormalizeObservation(paying(AutoresetMode.NEXT_STEP)))
    assert model.rollout_buffer.skipped.any()
    assert model.rollout_buffer.observations.min() < 0


@pytest.mark.skipif(GYMNASIUM < (1, 3), reason="nobody refuses there")
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_the_wrapper_that_normalises_observations_refuses_other_modes(mode: AutoresetMode) -> None:
    with pytest.raises((AssertionError, ValueError), match="NEXT_STEP"):
        NormalizeObservation(paying(mode))


def test_what_a_wrapper_pays_for_a_skipped_step_is_in_no_return() -> None:
    paid(TransformReward(paying(AutoresetMode.NEXT_STEP), np.ones_like))


class WholeResetsOnly(VectorWrapper):
    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        if options and "reset_mask" in options:
            raise ValueError("no partial resets")
        return super().reset(seed=seed, options=options)


def test_a_wrapper_that_refuses_reset_masks_is_named_with_the_mode_to_use() -> None:
    env = GymnasiumVecEnv(WholeResetsOnly(paying(AutoresetMode.DISABLED)))
    env.reset()
    with pytest.raises(ValueError, match=r"WholeResetsOnly.* cannot reset some .* no partial resets; .*SAME_STEP"):
        for _ in range(3):
            env.step(np.zeros(2, int))


def test_native_cartpole_is_trained_and_evaluated() -> None:
    env = gym.make_vec("CartPole-v1", 4, vectorization_mode="vector_entry_point")
    model = RecurrentPPO("MlpXLSTMPolicy", env, n_steps=64, batch_size=64, seed=0).learn(512)
    wrapped = model.get_env()
    assert wrapped is not None
    returns, lengths = evaluate_policy(model, wrapped, 8, return_episode_rewards=True)
    assert returns == lengths
    assert isinstance(lengths, list) and min(lengths) >= 8
    result = evaluate(model, wrapped, 8, seed=0)
    assert (result.returns == result.lengths).all()


def test_attributes_and_methods_of_parts() -> None:
    env = vector(AutoresetMode.SAME_STEP)
    env.reset()
    assert env.get_attr("episode") == [0, 0, 0]
    env.set_attr("length", 9, indices=[1])
    assert env.get_attr("length", indices=1) == [9]
    assert len(env.env_method("reset", indices=[0, 2])) == 2
    with pytest.raises(AttributeError):
        env.get_attr("absent")
    assert not env.has_attr("action_masks")


def test_environments_without_parts_cannot_be_changed_one_by_one() -> None:
    env = GymnasiumVecEnv(NativeLedger(3))
    assert env.get_attr("num_envs") == [3, 3, 3]
    env.set_attr("speed", 2)
    assert env.get_attr("speed") == [2, 2, 2]
    with pytest.raises(ValueError, match=r"cannot set 'speed' in environments \[1\] alone: NativeLedger has no parts"):
        env.set_attr("speed", 3, indices=1)


def test_what_is_no_vector_environment_is_refused() -> None:
    with pytest.raises(TypeError, match="env is a Ledger: make one with"):
        GymnasiumVecEnv(Ledger())  # type: ignore[arg-type]
