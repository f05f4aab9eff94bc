"""What environments may do without, and in which forms they may answer."""

import io
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize

from tests.agents.foreign_env import FOREIGN, Engine, Stub, raises
from tests.agents.small_agents import agent
from xlstm_rl.agents import MaskedModel, RecurrentPPO, VecMemoryInputs, evaluate, evaluate_random
from xlstm_rl.inspection import record_episode
from xlstm_rl.vec_envs.env_contract import FaultyEnvironmentError

SMALL: dict[str, Any] = {"n_steps": 10, "batch_size": 20, "n_epochs": 1}


@pytest.mark.parametrize(
    ("kind", "normalized"),
    [
        *((kind, False) for kind in FOREIGN),
        # Stable-Baselines3's own wrappers ask an adapter for more
        *((kind, True) for kind in FOREIGN if not kind.startswith("adapter")),
    ],
)
def test_an_environment_with_what_a_step_needs_is_enough(kind: str, normalized: bool) -> None:

    def new_env() -> Any:
        return VecNormalize(FOREIGN[kind]()) if normalized else FOREIGN[kind]()

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = agent(env=new_env(), **SMALL)
    refuses_seeds = "raises A" in kind or "raises N" in kind or kind.startswith("adapter")
    assert any("takes no seed" in str(entry.message) for entry in warned) == refuses_seeds
    model.learn(80)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = evaluate(model, new_env(), 8, seed=3)
        assert result.lengths.tolist() == [5] * 8
        assert evaluate_random(new_env(), 8, seed=3).lengths.tolist() == [5] * 8
        assert MaskedModel(model, new_env()).predict(np.zeros((4, 2), np.float32))[0].shape == (4,)
        file = io.BytesIO()
        model.save_checkpoint(file)
        file.seek(0)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        resumed = RecurrentPPO.resume(file, new_env())
    assert any("start new episodes: " in str(entry.message) for entry in warned)
    assert resumed.learn(80, reset_num_timesteps=False).num_timesteps == 160


@pytest.mark.parametrize("kind", [NotImplementedError, gymnasium.error.DependencyNotInstalled])
def test_one_without_pictures_is_inspected_without(kind: type[Exception]) -> None:
    class One(Engine):
        num_envs = 1

        def reset(self) -> Any:
            return super().reset()[:1]

        def step_wait(self) -> Any:
            return tuple(part[:1] for part in super().step_wait())

    env = Stub(lambda name: raises(kind)(name) if name == "get_images" else raises(NotImplementedError)(name))
    env.engine, env.num_envs = One(), 1
    env.render_mode = "rgb_array"
    with pytest.warns(UserWarning, match="takes no seed"):
        model = agent(env=env, **SMALL)
    episode = record_episode(model, env, max_steps=20)
    assert episode.frames == [] and len(episode.rewards) == 5


def test_observations_are_kept_although_the_simulator_writes_over_them() -> None:
    model = agent(env=Stub(lambda name: None), **SMALL).learn(40)
    expected = np.arange(10) % 5 / 5
    np.testing.assert_allclose(model.rollout_buffer.observations[:, 0, 0], expected, rtol=1e-6)


def of_rewards(change: Callable[[np.ndarray], Any]) -> Callable[[tuple[Any, ...]], Any]:
    return lambda answer: (answer[0], change(answer[1]), *answer[2:])


def of_dones(change: Callable[[np.ndarray], Any]) -> Callable[[tuple[Any, ...]], Any]:
    return lambda answer: (*answer[:2], change(answer[2]), answer[3])


def of_observations(change: Callable[[np.ndarray], Any]) -> Callable[[tuple[Any, ...]], Any]:
    return lambda answer: (change(answer[0]), *answer[1:])


class Foreign:
    """An array of another library: only its data can be had."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.array.flags.writeable = False

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.array if dtype is None else self.array.astype(dtype)


FORMS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "dones float32": of_dones(lambda dones: dones.astype(np.float32)),
    "dones int64": of_dones(lambda dones: dones.astype(np.int64)),
    "dones uint8": of_dones(lambda dones: dones.astype(np.uint8)),
    "dones list": of_dones(lambda dones: dones.tolist()),
    "dones list of numbers": of_dones(lambda dones: dones.astype(float).tolist()),
    "dones tensor": of_dones(torch.from_numpy),
    "dones of another library": of_dones(lambda dones: Foreign(dones.astype(np.float32))),
    "rewards float64": of_rewards(lambda rewards: rewards.astype(np.float64)),
    "rewards int64": of_rewards(lambda rewards: rewards.astype(np.int64)),
    "rewards bool": of_rewards(lambda rewards: rewards > 0),
    "rewards list": of_rewards(lambda rewards: rewards.tolist()),
    "rewards tensor": of_rewards(torch.from_numpy),
    "rewards of another library": of_rewards(lambda rewards: Foreign(rewards)),
    "observations float64": of_observations(lambda obs: obs.astype(np.float64)),
    "observations float16": of_observations(lambda obs: obs.astype(np.float16)),
    "observations big-endian": of_observations(lambda obs: obs.astype(">f4")),
    "observations int64": of_observations(lambda obs: (obs > 0).astype(np.int64)),
    "observations list": of_observations(lambda obs: obs.tolist()),
    "observations tensor": of_observations(lambda obs: torch.from_numpy(obs)),
    "observations of another library": of_observations(lambda obs: Foreign(obs.copy())),
    "infos tuple": lambda answer: (*answer[:3], tuple(answer[3])),
    "a list": list,
    "final observation a list": lambda answer: (
        *answer[:3],
        [{key: part.tolist() for key, part in info.items()} for info in answer[3]],
    ),
}


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_answers_in_any_form_that_holds_numbers_are_taken(form: str, inputs: bool) -> None:
    env: Any = Stub(lambda name: None, FORMS[form])
    usual: Any = Stub(lambda name: None)
    if inputs:
        env, usual = VecMemoryInputs(env), VecMemoryInputs(usual)
    policy = "MultiInputXLSTMPolicy" if inputs else "MlpXLSTMPolicy"
    model = agent(env=env, policy=policy, **SMALL).learn(80)
    other = agent(env=usual, policy=policy, **SMALL).learn(80)
    for name in ("episode_starts", "ended", "terminated"):
        np.testing.assert_array_equal(getattr(model.rollout_buffer, name), getattr(other.rollout_buffer, name))
    if form != "observations int64":
        np.testing.assert_allclose(model.rollout_buffer.returns, other.rollout_buffer.returns, rtol=1e-2, atol=1e-3)
    assert evaluate(model, env, 4).returns.tolist() == [5.0] * 4


WRONG: dict[str, tuple[Callable[[tuple[Any, ...]], Any], str]] = {
    "dones of one row": (of_dones(lambda dones: dones[:1]), r"dones of shape \(1,\).*in step 0.*each of 4"),
    "dones half true": (of_dones(lambda dones: dones + 0.5), r"environment 0 answered dones 0.5 in step 0"),
    "dones NaN": (of_dones(lambda dones: np.array([0, 0, np.nan, 0])), r"environment 2 answered dones nan in step 0"),
    "dones None": (of_dones(lambda dones: None), "dones None of type NoneType in step 0"),
    "rewards of one row": (of_rewards(lambda rewards: rewards[:1]), r"rewards of shape \(1,\).*each of 4"),
    "rewards as a column": (of_rewards(lambda rewards: rewards[:, None]), r"rewards of shape \(4, 1\)"),
    "rewards of objects": (of_rewards(lambda rewards: ["much"] * 4), "rewards of type list with 4 entries"),
    "one reward": (of_rewards(lambda rewards: 1.0), r"rewards 1.0 of type float"),
    "observations of one row": (of_observations(lambda obs: obs[:1]), r"shape \(1, 2\).* wants the shape \(4, 2\)"),
    "observations of one number": (
        of_observations(lambda obs: obs[:, :1]),
        r"shape \(4, 1\).*the shape \(4, 2\)",
    ),
    "observations None": (of_observations(lambda obs: None), "observations in step 0.* None"),
    "observations ragged": (of_observations(lambda obs: [[1, 2], [1], [2], [3]]), "observations in step 0"),
    "five parts": (lambda answer: (*answer, {}), "type tuple with 5 entries in step 0"),
    "nothing": (lambda answer: None, "None of type NoneType in step 0"),
    "infos None": (lambda answer: (*answer[:3], None), "infos None"),
    "infos of gymnasium": (lambda answer: (*answer[:3], {}), "infos of type dict"),
    "one info None": (lambda answer: (*answer[:3], [{}, {}, {}, None]), "environment 3 answered the info None"),
    "one info a list": (lambda answer: (*answer[:3], [{}, [], {}, {}]), "environment 1 answered the info of type list"),
    "one success a word": (
        lambda answer: (*answer[:3], [{}, {}, {"is_success": "yes"}, {}]),
        "environment 2 answered is_success 'yes'",
    ),
    "final observation of one number": (
        lambda answer: (*answer[:3], [{}, {"terminal_observation": np.zeros(1)}, {}, {}]),
        r"environment 1 answered the final observation in step 0.*shape \(1,\)",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_other_answers_are_refused_with_environment_and_step(wrong: str) -> None:
    change, message = WRONG[wrong]
    env = Stub(lambda name: None, change)
    model = agent(env=env, **SMALL)
    with pytest.raises(FaultyEnvironmentError, match=message):
        model.learn(80)
    with pytest.raises(FaultyEnvironmentError, match="of the evaluation"):
        evaluate(model, env, 4)


@pytest.mark.parametrize("own", [7, "first", {"number": 7}, np.zeros(2)])
def test_what_an_environment_itself_calls_episode_is_no_record_of_one(own: Any) -> None:
    def change(answer: tuple[Any, ...]) -> Any:
        return (*answer[:3], [{**info, "episode": own, "is_success": None} for info in answer[3]])

    model = agent(env=Stub(lambda name: None, change), **SMALL).learn(80)
    assert not model.ep_info_buffer and not model.ep_success_buffer
    result = evaluate(model, Stub(lambda name: None, change), 4)
    assert result.returns.tolist() == [5.0] * 4 and result.successes is None


def test_whole_numbers_that_the_space_cannot_hold_are_refused() -> None:
    env = Stub(lambda name: None, of_observations(lambda obs: np.full((4, 2), 300)))
    env.observation_space = spaces.Box(0, 255, (2,), np.uint8)
    with pytest.raises(FaultyEnvironmentError, match="numbers that Box.* cannot hold"):
        agent(env=env, **SMALL).learn(80)


def test_errors_of_a_users_own_environment_keep_their_kind() -> None:
    class BrokenError(Exception):
        pass

    def broken(answer: Any) -> Any:
        raise BrokenError("physics")

    with pytest.raises(BrokenError, match="physics") as caught:
        agent(env=Stub(lambda name: None, broken), **SMALL).learn(80)
    assert "in step 0 of the rollout" in str(getattr(caught.value, "__notes__", "in step 0 of the rollout"))
