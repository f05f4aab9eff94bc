"""Batches of environments: equal to gymnasium's own batches of the single ones, in all they return."""

import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from xlstm_rl.envs import Parity, SymbolStreamVectorEnv, TaskVectorEnv, task_facts
from xlstm_rl.envs.registration import TASKS

IDS = [f"xlstm_rl/{name}-v0" for name in TASKS]
# Small tasks, whose episodes end often.
PARAMETERS: dict[str, dict[str, Any]] = {
    "TMaze": {"corridor_length": 2},
    "RepeatFirst": {"length": 5, "distractors": False},
    "KeyValueRecall": {"num_pairs": 3, "num_keys": 9, "key_exponent": 1.0},
    "NearestSoFar": {"num_items": 4, "dim": 3},
    "NoisyEvidence": {"num_samples": 3},
    "KeyDoor": {"delay": 3, "num_keys": 2},
    "Pairs": {"num_pairs": 2, "num_turns": 5},
    "Bandit": {"num_pulls": 4},
}
MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP]
each_id = pytest.mark.parametrize("env_id", IDS)


def batches(env_id: str, num_envs: int, mode: AutoresetMode, **parameters: Any) -> tuple[TaskVectorEnv[Any], Any]:
    """Ours and gymnasium's."""
    ours = gym.make_vec(env_id, num_envs, "vector_entry_point", autoreset_mode=mode, **parameters)
    assert isinstance(ours, TaskVectorEnv)
    return ours, gym.make_vec(env_id, num_envs, "sync", {"autoreset_mode": mode}, **parameters)


def assert_same(ours: Any, theirs: Any) -> None:
    """Same kinds, shapes, dtypes and bits, all the way down."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, tuple):
        for our, their in zip(ours, theirs, strict=True):
            assert_same(our, their)
    elif isinstance(ours, np.ndarray) and ours.dtype == object:
        assert_same(tuple(ours), tuple(theirs))
    elif ours is not None:
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        np.testing.assert_array_equal(ours, theirs)


@each_id
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("small", [False, True])
def test_everything_returned_equals_that_of_single_environments(env_id: str, mode: AutoresetMode, small: bool) -> None:
    parameters = PARAMETERS.get(env_id.split("/")[1].removesuffix("-v0"), {}) if small else {}
    ours, theirs = batches(env_id, 5, mode, **parameters)
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
    generator = np.random.default_rng(0)
    num_ended = 0
    seeds: list[Any] = [3, [7, None, 1, 2**40, None], None]
    for seed in seeds:
        assert_same(ours.reset(seed=seed), theirs.reset(seed=seed))
        for _ in range(ours.facts.horizon + 20):
            actions = generator.integers(ours.single_action_space.n, size=5)  # type: ignore[attr-defined]
            result = ours.step(actions)
            assert_same(result, theirs.step(actions))
            num_ended += int((result[2] | result[3]).sum())
    assert num_ended >= 10
    assert [g.bit_generator.state for g in ours.np_random] == [g.bit_generator.state for g in theirs.np_random]
    assert ours.np_random_seed == theirs.np_random_seed


@each_id
def test_a_batch_without_autoreset_is_reset_by_mask(env_id: str) -> None:
    parameters = PARAMETERS.get(env_id.split("/")[1].removesuffix("-v0"), {})
    ours, theirs = batches(env_id, 4, AutoresetMode.DISABLED, **parameters)
    assert_same(ours.reset(seed=0), theirs.reset(seed=0))
    generator = np.random.default_rng(0)
    mask = np.array([True, False, True, False])
    for _ in range(80):
        actions = generator.integers(ours.single_action_space.n, size=4)  # type: ignore[attr-defined]
        result = ours.step(actions)
        assert_same(result, theirs.step(actions))
        # Some are also reset in mid-episode, so that the rows are at different steps.
        mask = result[2] | result[3] | (generator.random(4) < 0.05)
        if mask.any():
            options = {"reset_mask": mask}
            assert_same(ours.reset(options=options), theirs.reset(options=dict(options)))
            assert options.keys() == {"reset_mask"}


@each_id
@pytest.mark.parametrize("mode", MODES)
def test_oracles_and_pictures_are_those_of_the_single_environments(env_id: str, mode: AutoresetMode) -> None:
    for render_mode in ("ansi", "rgb_array"):
        ours, theirs = batches(env_id, 3, mode, render_mode=render_mode)
        ours.reset(seed=0)
        theirs.reset(seed=0)
        for _ in range(30):
            actions = ours.oracle_actions()
            np.testing.assert_array_equal(actions, theirs.call("oracle_action"))
            pictures = zip(ours.render(), theirs.render(), strict=True)
            assert all(np.array_equal(our, their) for our, their in pictures)
            ours.step(actions)
            theirs.step(actions)


@each_id
def test_oracles_collect_the_optimal_return(env_id: str) -> None:
    envs = gym.make_vec(env_id, 50, "vector_entry_point", autoreset_mode="SameStep")
    assert isinstance(envs, TaskVectorEnv)
    envs.reset(seed=0)
    total = np.zeros(50)
    returns: list[float] = []
    for _ in range(2 * envs.facts.horizon):
        _, reward, terminated, truncated, _ = envs.step(envs.oracle_actions())
        total += reward
        ended = terminated | truncated
        returns += total[ended].tolist()
        total[ended] = 0.0
    assert len(returns) >= 100
    tolerance = 4 * float(np.std(returns)) / np.sqrt(len(returns)) + 1e-9
    assert np.mean(returns) == pytest.approx(envs.facts.optimal_return, abs=tolerance)


@each_id
def test_a_batch_is_what_make_vec_makes_and_states_its_facts(env_id: str) -> None:
    envs = gym.make_vec(env_id, 2)
    assert isinstance(envs, TaskVectorEnv) and envs.spec is not None and envs.spec.id == env_id
    assert envs.facts == task_facts(gym.make(env_id))
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert gym.make(env_id).metadata.get("autoreset_mode") is None
    assert gym.spec(env_id).to_json()


@each_id
def test_a_pickled_batch_goes_on_alike(env_id: str) -> None:
    envs = gym.make_vec(env_id, 3)
    envs.reset(seed=0)
    envs.step(np.zeros(3, np.int64))
    copy = pickle.loads(pickle.dumps(envs))
    for _ in range(40):
        assert_same(envs.step(np.ones(3, np.int64)), copy.step(np.ones(3, np.int64)))


@each_id
def test_returned_arrays_are_not_shared(env_id: str) -> None:
    envs, twin = gym.make_vec(env_id, 3), gym.make_vec(env_id, 3)
    envs.reset(seed=0)[0][:] = 9.0
    twin.reset(seed=0)
    for _ in range(60):
        ours, theirs = envs.step(np.zeros(3, np.int64)), twin.step(np.zeros(3, np.int64))
        assert_same(ours, theirs)
        for array in ours[:4]:
            array[:] = 1


def test_wrappers_of_gymnasium_fit() -> None:
    envs = gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec("xlstm_rl/Copy-v0", 4))
    envs.reset(seed=0)
    for _ in range(16):
        infos = envs.step(envs.action_space.sample())[4]
    assert infos["episode"]["l"].tolist() == [16] * 4


def test_a_task_of_ones_own_comes_in_batches() -> None:
    class Short(Parity):
        def __init__(self) -> None:
            super().__init__(3)

    envs = SymbolStreamVectorEnv(Short, 6)
    assert envs.reset(seed=0)[0].shape == (6, 3)
    assert [envs.step(np.zeros(6, np.int64))[2].all() for _ in range(4)] == [False, False, True, False]


def test_no_step_or_partial_reset_before_a_reset() -> None:
    envs = gym.make_vec("xlstm_rl/Parity-v0", 2)
    with pytest.raises(gym.error.ResetNeeded, match="no episode was ever started"):
        envs.step(np.zeros(2, np.int64))
    with pytest.raises(gym.error.ResetNeeded, match="the first reset must be one of all 2 environments"):
        envs.reset(options={"reset_mask": np.array([True, False])})


def test_no_step_past_the_end_without_autoreset() -> None:
    envs = gym.make_vec("xlstm_rl/Parity-v0", 2, autoreset_mode="Disabled", length=2)
    envs.reset(seed=0)
    envs.step(np.zeros(2, np.int64))
    envs.step(np.zeros(2, np.int64))
    with pytest.raises(gym.error.ResetNeeded, match=r"episodes \[0 1\] are over; reset them by reset_mask"):
        envs.step(np.zeros(2, np.int64))


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.array([0, 2]), r"actions must be in 0\.\.1, got \[0 2\]"),
        (np.array([-1, 0]), r"actions must be in 0\.\.1, got \[-1  0\]"),
        (np.array([0]), r"actions must be 2 whole numbers, got int64 \(1,\)"),
        (np.array([0.0, 1.0]), r"actions must be 2 whole numbers, got float64 \(2,\)"),
    ],
)
def test_actions_that_do_not_fit_are_refused(actions: Any, message: str) -> None:
    envs = gym.make_vec("xlstm_rl/Parity-v0", 2)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        envs.step(actions)


def test_seeds_and_masks_that_do_not_fit_are_refused() -> None:
    envs = gym.make_vec("xlstm_rl/Parity-v0", 2)
    with pytest.raises(ValueError, match="seed must have an entry for each of 2 environments, got 3"):
        envs.reset(seed=[1, 2, 3])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be an array of bool, got "):
        envs.reset(options={"reset_mask": [True, False]})
    with pytest.raises(ValueError, match=r"must be \[2\] with a True in it"):
        envs.reset(options={"reset_mask": np.zeros(2, np.bool_)})
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        gym.make_vec("xlstm_rl/Parity-v0", 0)
