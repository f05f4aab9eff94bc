"""Vector environments that give tensors: the same training, and no observation goes through NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorWrapper
from torch import Tensor

from benchmarks.tensor_recall import TensorRecall
from tests.agents.small_agents import SMALL
from tests.agents.test_gymnasium_vector import Ledger
from xlstm_rl.agents import GymnasiumVecEnv, RecurrentPPO, evaluate
from xlstm_rl.vec_envs.env_contract import FaultyEnvironmentError, map_obs

N_ENVS = 6


class Varied(TensorRecall):
    """The task with observations of another kind; episodes end by a time limit if told so."""

    def __init__(self, kind: str, *, arrays: bool, truncates: bool = False) -> None:
        super().__init__(N_ENVS, length=5, noise=3, arrays=arrays)
        self.kind, self.truncates = kind, truncates
        if kind == "dict":
            parts = {"a": spaces.Box(-np.inf, np.inf, (8,), np.float32), "b": spaces.Discrete(4)}
            self.observation_space = spaces.Dict(parts)
        elif kind == "choice":
            self.observation_space = spaces.Discrete(4)
        elif kind == "image":
            self.observation_space = spaces.Box(0, 255, (1, 4, 2), np.uint8)

    def _shown(self, first: Tensor) -> Any:
        shown: Any = super()._shown(first)
        if self.kind == "dict":
            # whole numbers of another width than the space's
            return {"a": shown, "b": self._out(self.cues.to(torch.int32))}
        if self.kind == "choice":
            return self._out(self.cues.clone())
        if self.kind == "image":
            return self._out((torch.as_tensor(shown).reshape(-1, 1, 4, 2).clamp(0, 1) * 255).to(torch.uint8))
        return shown

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = super().step_wait()
        if self.truncates:
            for row in np.flatnonzero(dones):
                final = map_obs(lambda part, row=row: part[(row + 1) % N_ENVS], obs)
                infos[row] = {"TimeLimit.truncated": True, "terminal_observation": final}
        return obs, rewards, dones, infos


def trained(env: Any, n_steps: int = 20, rollouts: int = 2, **settings: Any) -> RecurrentPPO:
    settings = {"policy_kwargs": SMALL, "n_epochs": 1, "batch_size": 40, "seq_len": 8, "device": "cpu", **settings}
    policy = "MultiInputXLSTMPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpXLSTMPolicy"
    return RecurrentPPO(policy, env, n_steps=n_steps, seed=0, **settings).learn(n_steps * env.num_envs * rollouts)


def weights(model: RecurrentPPO) -> Tensor:
    return torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach()


@pytest.mark.parametrize("truncates", [False, True])
@pytest.mark.parametrize("kind", ["box", "dict", "choice", "image"])
def test_tensors_train_the_same_agent_as_arrays(kind: str, truncates: bool) -> None:
    models = [trained(Varied(kind, arrays=arrays, truncates=truncates and kind != "image")) for arrays in (True, False)]
    assert torch.equal(*map(weights, models))
    stored = map_obs(lambda part: isinstance(part, Tensor), models[1].rollout_buffer.observations)
    assert np.all([*stored.values()] if isinstance(stored, dict) else stored)


def test_no_observation_goes_through_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[tuple[int, ...]] = []
    numpy, array = Tensor.numpy, Tensor.__array__

    def watched(function: Any) -> Any:
        def convert(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
            converted.append(tuple(tensor.shape))
            return function(tensor, *arguments, **named)

        return convert

    monkeypatch.setattr(Tensor, "numpy", watched(numpy))
    monkeypatch.setattr(Tensor, "__array__", watched(array))
    trained(TensorRecall(N_ENVS, noise=8))
    # actions, values, rewards and the like have one number for each environment
    assert converted and not [shape for shape in converted if 13 in shape]


def test_actions_come_as_tensors_where_observations_are() -> None:
    taken: list[Any] = []

    class Noting(TensorRecall):
        def step_async(self, actions: Any) -> None:
            taken.append(actions)
            super().step_async(actions)

    env = Noting(N_ENVS)
    evaluate(trained(env), env, 6, max_episode_steps=50)
    assert {type(actions) for actions in taken} == {Tensor}


def test_run_with_tensors_resumes(tmp_path: Path) -> None:
    model = trained(TensorRecall(N_ENVS), rollouts=1)
    model.save_checkpoint(tmp_path / "run.zip")
    with pytest.warns(UserWarning, match="new episodes"):
        again = RecurrentPPO.resume(tmp_path / "run.zip", TensorRecall(N_ENVS), device="cpu")
    again.learn(N_ENVS * 20, reset_num_timesteps=False)
    assert again.num_timesteps == N_ENVS * 40


class AsTensors(VectorWrapper):
    """Like NumpyToTorch of gymnasium, which needs another package."""

    def reset(self, **told: Any) -> Any:
        obs, infos = super().reset(**told)
        return torch.from_numpy(obs.copy()), infos

    def step(self, actions: Any) -> Any:
        assert isinstance(actions, Tensor)
        obs, rewards, terminated, truncated, infos = super().step(actions.numpy())
        return torch.from_numpy(obs.copy()), *map(torch.from_numpy, (rewards, terminated, truncated)), infos


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_vector_environment_of_gymnasium_that_gives_tensors_trains_the_same_agent(mode: AutoresetMode) -> None:
    def plain() -> SyncVectorEnv:
        return SyncVectorEnv([Ledger] * 3, autoreset_mode=mode)

    tensors = AsTensors(plain())
    assert isinstance(GymnasiumVecEnv(AsTensors(plain())).reset(), Tensor)
    if mode is AutoresetMode.DISABLED:
        models = [trained(GymnasiumVecEnv(env)) for env in (plain(), tensors)]
        assert torch.equal(*map(weights, models))
    else:
        # in a wrapper another step is spent on a reset, so that there is nothing to compare
        trained(GymnasiumVecEnv(tensors))


@pytest.mark.parametrize(
    ("spoilt", "says"),
    [
        (lambda obs: obs[:, :3], "wants the shape"),
        (lambda obs: obs[:2], "wants the shape"),
        (lambda obs: obs.to(torch.complex64), "wants the shape"),
    ],
)
def test_tensors_of_another_shape_are_refused(spoilt: Any, says: str) -> None:
    class Spoilt(TensorRecall):
        def _shown(self, first: Tensor) -> Any:
            return spoilt(super()._shown(first))

    with pytest.raises(FaultyEnvironmentError, match=says):
        trained(Spoilt(N_ENVS))


def test_whole_numbers_that_the_space_cannot_hold_are_refused() -> None:
    class Large(Varied):
        def _shown(self, first: Tensor) -> Any:
            return torch.full((N_ENVS, 1, 4, 2), 256)

    with pytest.raises(FaultyEnvironmentError, match="cannot hold"):
        trained(Large("image", arrays=False))


def test_nan_in_a_tensor_names_environment_and_entry() -> None:
    class Broken(TensorRecall):
        def _shown(self, first: Tensor) -> Any:
            shown = super()._shown(first)
            shown[4, 7] = torch.nan
            return shown

    with pytest.raises(FloatingPointError, match=r"environment 4 is nan at index \[7\]"):
        trained(Broken(N_ENVS))


def test_tensors_that_the_environment_writes_over_are_kept() -> None:
    class InPlace(TensorRecall):
        buffer: Tensor | None = None

        def _shown(self, first: Tensor) -> Any:
            shown = super()._shown(first)
            self.buffer = shown if self.buffer is None else self.buffer.copy_(shown)
            return self.buffer

    assert torch.equal(weights(trained(InPlace(N_ENVS))), weights(trained(TensorRecall(N_ENVS))))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_observations_stay_on_the_gpu() -> None:
    model = trained(TensorRecall(N_ENVS, device="cuda"), device="cuda")
    assert model.rollout_buffer.observations.device.type == "cuda"
