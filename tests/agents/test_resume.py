"""An interrupted and resumed run equals the uninterrupted one bit for bit."""

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize

from tests.agents.small_agents import SMALL, assert_same
from xlstm_rl.agents import RecurrentPPO
from xlstm_rl.agents.checkpoint import CheckpointError
from xlstm_rl.envs import Resumable, TMaze
from xlstm_rl.memory import leaves
from xlstm_rl.vec_envs.guarded_vec_env import GuardedSubprocVecEnv

N_ENVS, N_STEPS, ROLLOUTS = 3, 10, 5

# a linear schedule ends with the single rollout that some of these are trained on
pytestmark = pytest.mark.filterwarnings("ignore:the learning rate was 0")


def envs(env_id: Any = "xlstm_rl/CartPoleNoVelocity-v0", **kwargs: Any) -> VecEnv:
    return make_vec_env(env_id, N_ENVS, seed=4, wrapper_class=Resumable, **kwargs)


def learner(env: VecEnv, **kwargs: Any) -> RecurrentPPO:
    settings: dict[str, Any] = {
        "n_steps": N_STEPS,
        "batch_size": 12,
        "n_epochs": 2,
        "seq_len": 5,
        "seed": 3,
        "device": "cpu",
        "policy_kwargs": SMALL,
        "learning_rate": LinearSchedule(3e-3, 0.0, 1.0),
    }
    return RecurrentPPO("MlpXLSTMPolicy", env, **settings | kwargs)


class Save(BaseCallback):
    """Writes a checkpoint where it is told, before a rollout or within one."""

    def __init__(self, at: int, file: io.BytesIO) -> None:
        super().__init__()
        self.at, self.file = at, file

    def _on_rollout_start(self) -> None:
        self._save()

    def _on_step(self) -> bool:
        if self.num_timesteps % (N_ENVS * N_STEPS):
            self._save()
        return True

    def _save(self) -> None:
        if self.num_timesteps == self.at:
            self.model.save_checkpoint(self.file, {"at": self.at})  # type: ignore[attr-defined]


def interrupted_and_resumed(make: Callable[[], VecEnv], cut: int, **kwargs: Any) -> tuple[RecurrentPPO, RecurrentPPO]:
    """The same training, in one piece and in two."""
    total, file = ROLLOUTS * N_STEPS * N_ENVS, io.BytesIO()
    whole = learner(make(), **kwargs).learn(total, callback=Save(cut, file))
    for spoil in (random.seed, np.random.seed, torch.manual_seed):
        spoil(99)
    env = make()
    env.reset()
    parts = RecurrentPPO.resume(file, env, device="cpu")
    assert parts.num_timesteps <= cut < parts.num_timesteps + N_STEPS * N_ENVS
    parts.learn(total - parts.num_timesteps, reset_num_timesteps=False)
    return whole, parts


def assert_same_run(whole: RecurrentPPO, parts: RecurrentPPO) -> None:
    assert_same(whole, parts)
    assert whole.num_timesteps == parts.num_timesteps
    assert np.array_equal(whole._last_obs, parts._last_obs)  # type: ignore[arg-type]
    assert np.array_equal(whole._last_episode_starts, parts._last_episode_starts)  # type: ignore[arg-type]
    for one, two in zip(leaves(whole._last_state), leaves(parts._last_state), strict=True):
        assert torch.equal(one, two)
    returns = [[(episode["r"], episode["l"]) for episode in model.ep_info_buffer or ()] for model in (whole, parts)]
    assert returns[0] == returns[1]
    assert vars(whole._advantage_scale) == vars(parts._advantage_scale)
    assert whole._gradient_norm == parts._gradient_norm
    assert whole._n_updates == parts._n_updates


@pytest.mark.parametrize("cut", [0, 30, 60, 120, 33, 57, 90 + 27])
def test_resumed_run_equals_the_uninterrupted_one(cut: int) -> None:
    assert_same_run(*interrupted_and_resumed(envs, cut))


def normalized() -> VecEnv:
    return VecNormalize(envs(), gamma=0.9)


def stacked() -> VecEnv:
    return VecFrameStack(VecMonitor(DummyVecEnv([lambda: Resumable(TMaze(3)) for _ in range(N_ENVS)])), 3)


def pendulum() -> VecEnv:
    return envs("Pendulum-v1")


def processes() -> VecEnv:
    return envs("xlstm_rl/Parity-v0", vec_env_cls=GuardedSubprocVecEnv, vec_env_kwargs={"start_method": "fork"})


CASES: dict[str, tuple[Callable[[], VecEnv], dict[str, Any]]] = {
    "normalised": (normalized, {}),
    "stacked and monitored": (stacked, {}),
    "gSDE": (pendulum, {"use_sde": True, "sde_sample_freq": 4}),
    "processes": (processes, {}),
    "refreshed states, separate critic": (
        envs,
        {"refresh_state": True, "policy_kwargs": SMALL | {"critic_memory": "separate"}},
    ),
}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("cut", [60, 72])
@pytest.mark.parametrize("case", CASES)
def test_every_wrapper_and_policy_resumes_exactly(case: str, cut: int) -> None:
    make, kwargs = CASES[case]
    whole, parts = interrupted_and_resumed(make, cut, **kwargs)
    assert_same_run(whole, parts)
    for model in (whole, parts):
        assert model.env is not None
        model.env.close()


class StopAt(BaseCallback):
    """Stops training within a rollout; saves at its end if there is a file."""

    def __init__(self, at: int, file: io.BytesIO | None = None) -> None:
        super().__init__()
        self.at, self.file = at, file

    def _on_step(self) -> bool:
        return self.num_timesteps < self.at

    def _on_training_end(self) -> None:
        if self.file is not None:
            self.model.save_checkpoint(self.file)  # type: ignore[attr-defined]


def test_run_that_a_callback_stopped_is_saved_as_it_is_and_goes_on_from_there() -> None:
    whole, file = learner(envs()), io.BytesIO()
    whole.learn(300, callback=StopAt(42))
    assert whole.checkpoint_step == whole.num_timesteps == 42
    whole.save_checkpoint(file)
    whole.learn(60, reset_num_timesteps=False)
    parts = RecurrentPPO.resume(file, envs(), device="cpu")
    assert parts.num_timesteps == 42
    parts.learn(60, reset_num_timesteps=False)
    assert_same_run(whole, parts)


def test_callbacks_of_a_stopped_run_save_it_as_before_the_rollout() -> None:
    file = io.BytesIO()
    learner(envs()).learn(300, callback=StopAt(42, file))
    assert RecurrentPPO.resume(file, envs()).num_timesteps == 30


def test_the_start_of_a_rollout_that_was_stopped_is_not_saved_later() -> None:
    model, file = learner(envs()), io.BytesIO()
    model.learn(300, callback=StopAt(42))
    model.learn(30, callback=Save(42, file), reset_num_timesteps=False)
    assert RecurrentPPO.resume(file, envs()).num_timesteps == 42


def test_run_that_an_exception_ended_is_saved_as_before_the_rollout() -> None:
    class Fail(StopAt):
        def _on_step(self) -> bool:
            if not super()._on_step():
                raise KeyboardInterrupt
            return True

    model, file = learner(envs()), io.BytesIO()
    with pytest.raises(KeyboardInterrupt):
        model.learn(60, callback=Fail(42))
    model.save_checkpoint(file)
    parts = RecurrentPPO.resume(file, envs(), device="cpu")
    assert model.checkpoint_step == parts.num_timesteps == 30
    parts.learn(30, reset_num_timesteps=False)
    assert_same_run(learner(envs()).learn(60), parts)


def test_global_generators_go_on() -> None:
    whole, file = learner(envs()), io.BytesIO()
    whole.learn(30)
    whole.save_checkpoint(file)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    RecurrentPPO.resume(file, envs())
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_the_same_seed_gives_the_same_weights() -> None:
    assert_same_run(learner(envs()).learn(60), learner(envs()).learn(60))


def test_notes_come_back_and_the_file_loads_as_an_agent(tmp_path: Path) -> None:
    model = learner(envs()).learn(30)
    model.save_checkpoint(tmp_path / "point", {"rows": 3})
    assert_same(model, RecurrentPPO.load(tmp_path / "point", device="cpu"))
    other = learner(envs(), seed=8)
    other.set_parameters(str(tmp_path / "point"))
    assert_same(model, other)


def test_checkpoint_of_a_run_on_the_cpu_leaves_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def start_cuda(*_: object) -> None:
        raise AssertionError("CUDA was asked for")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_rng_state", "get_rng_state_all", "set_rng_state", "set_rng_state_all"):
        monkeypatch.setattr(torch.cuda, name, start_cuda)
    file = io.BytesIO()
    learner(envs()).learn(2 * N_STEPS * N_ENVS).save_checkpoint(file)
    assert RecurrentPPO.resume(file, envs(), device="cpu").num_timesteps == 2 * N_STEPS * N_ENVS


def test_function_as_schedule_is_handed_over_to_resume(tmp_path: Path) -> None:
    def clip(progress: float) -> float:
        return 0.1 + 0.2 * progress

    model = learner(envs(), clip_range=clip).learn(N_ENVS * N_STEPS)
    with pytest.warns(UserWarning, match=r"clip_range is a function.*custom_objects=.* of load and resume"):
        model.save_checkpoint(tmp_path / "run")
    with pytest.warns(
        UserWarning, match=r"clip_range was a function.*custom_objects=.*, which load and resume take"
    ) as warned:
        assert RecurrentPPO.resume(tmp_path / "run", envs(), "cpu").clip_range(0.5) == clip(0.0)  # type: ignore[operator]
    assert warned[0].filename == __file__
    resumed = RecurrentPPO.resume(tmp_path / "run", envs(), "cpu", custom_objects={"clip_range": clip})
    assert resumed.clip_range(0.5) == clip(0.5)  # type: ignore[operator]


def test_agent_alone_is_no_run(tmp_path: Path) -> None:
    learner(envs()).save(tmp_path / "agent")
    with pytest.raises(CheckpointError, match="agent without its training run: RecurrentPPO.load reads it"):
        RecurrentPPO.resume(tmp_path / "agent", envs())


def test_another_number_of_environments_is_refused(tmp_path: Path) -> None:
    learner(envs()).learn(30).save_checkpoint(tmp_path / "point")
    with pytest.raises(CheckpointError, match="episodes of 3 environments cannot go on in 2"):
        RecurrentPPO.resume(tmp_path / "point", make_vec_env("xlstm_rl/CartPoleNoVelocity-v0", 2))


def test_another_number_of_wrappers_is_refused(tmp_path: Path) -> None:
    learner(envs()).learn(30).save_checkpoint(tmp_path / "point")
    with pytest.raises(CheckpointError, match="had 0 vector wrappers, the environment has 1"):
        RecurrentPPO.resume(tmp_path / "point", normalized())


def test_environments_that_do_not_tell_start_new_episodes(tmp_path: Path) -> None:
    def plain() -> VecEnv:
        return make_vec_env(lambda: gym.wrappers.TimeLimit(TMaze(3), 9), N_ENVS, seed=0)

    model = learner(plain()).learn(30)
    model.save_checkpoint(tmp_path / "point")
    with pytest.warns(UserWarning, match="new episodes: their state was not noted .wrap each in xlstm_rl.envs.Resum"):
        other = RecurrentPPO.resume(tmp_path / "point", plain())
    assert other._last_obs is None
    other.learn(30, reset_num_timesteps=False)
    assert other.num_timesteps == 60


class Noisy(gym.Env[np.ndarray, np.int64]):
    """Draws from where nobody sees it."""

    observation_space = spaces.Box(0, 1, (2,), np.float64)
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self.hidden = np.random.default_rng()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return self.hidden.random(2), {}

    def step(self, action: np.int64) -> Any:
        return self.hidden.random(2), 0.0, False, False, {}


def test_environments_that_are_not_deterministic_start_new_episodes(tmp_path: Path) -> None:
    learner(envs(Noisy)).learn(30).save_checkpoint(tmp_path / "point")
    with pytest.warns(UserWarning, match="environment 0 is not deterministic"):
        other = RecurrentPPO.resume(tmp_path / "point", envs(Noisy))
    other.learn(30, reset_num_timesteps=False)
