"""Every registered id: interface checks, seeds, parameters, copies, processes, facts."""

import pickle
import subprocess
import sys
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from xlstm_rl.envs import TaskFacts, register_envs, suite_ids, task_facts

STREAMS = ["RepeatFirst", "RepeatPrevious", "Parity", "KeyValueRecall", "CueRecall", "Copy", "Overwrite"]
STREAMS += ["NearestSoFar", "Cycle", "ShellGame", "NoisyEvidence", "KeyDoor"]
STREAM_IDS = [f"xlstm_rl/{name}-v0" for name in STREAMS]
OTHERS = ["TMaze", "EndlessTMaze", "ColorCubes", "Pairs", "Bandit"]
# no bounds are known of these
UNBOUNDED_IDS = ["xlstm_rl/RockSample-v0", "xlstm_rl/Battleship-v0"]
BOUNDED_IDS = [*(f"xlstm_rl/{name}-v0" for name in OTHERS), *STREAM_IDS]
OWN_IDS = [*BOUNDED_IDS, *UNBOUNDED_IDS]
CONTROL_IDS = [f"xlstm_rl/{name}NoVelocity-v0" for name in ("CartPole", "Pendulum", "Acrobot")]
each_id = pytest.mark.parametrize("env_id", OWN_IDS + CONTROL_IDS)
each_own_id = pytest.mark.parametrize("env_id", OWN_IDS)


def trajectory(env: gym.Env[Any, Any], *, seed: int, num_steps: int = 150) -> list[Any]:
    env.action_space.seed(seed)
    seen: list[Any] = [env.reset(seed=seed)[0].tolist()]
    for _ in range(num_steps):
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        seen.append((observation.tolist(), float(reward), terminated, truncated, info))
        if terminated or truncated:
            seen.append(env.reset()[0].tolist())
    return seen


def test_the_tests_cover_every_registered_id() -> None:
    assert sorted(OWN_IDS + CONTROL_IDS) == sorted(
        {key for key in gym.registry if key.startswith("xlstm_rl/")} - set(suite_ids())
    )


def test_registering_twice_changes_nothing() -> None:
    before = {key: id(spec) for key, spec in gym.registry.items()}
    register_envs()
    assert {key: id(spec) for key, spec in gym.registry.items()} == before


@each_own_id
def test_gymnasium_accepts_the_environment_without_a_warning(env_id: str) -> None:
    check_env(gym.make(env_id).unwrapped)


@pytest.mark.parametrize("env_id", CONTROL_IDS)
def test_gymnasium_accepts_the_wrapped_environment(env_id: str) -> None:
    with warnings.catch_warnings():
        # A wrapper is what is tested, and the action range of Pendulum is gymnasium's own.
        warnings.filterwarnings("ignore", message=".*different from the unwrapped version.*")
        warnings.filterwarnings("ignore", message=".*symmetric and normalized space.*")
        check_env(gym.make(env_id), skip_render_check=True)


@each_id
def test_stable_baselines3_accepts_the_environment(env_id: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*symmetric and normalized Box action space.*")
        check_env_for_sb3(gym.make(env_id))


@each_id
def test_equal_seeds_give_equal_trajectories_and_others_differ(env_id: str) -> None:
    env, twin = gym.make(env_id), gym.make(env_id)
    assert trajectory(env, seed=7) == trajectory(twin, seed=7) == trajectory(env, seed=7)
    assert trajectory(env, seed=7) != trajectory(env, seed=8)


@each_id
def test_an_unseeded_reset_goes_on_with_the_random_numbers(env_id: str) -> None:
    env = gym.make(env_id)

    def start(seed: int | None) -> list[Any]:
        return [env.reset(seed=seed)[0].tolist(), env.step(env.action_space.sample() * 0)[0].tolist()]

    first = start(0)
    assert any(start(None) != first for _ in range(30))


@each_own_id
def test_global_random_numbers_are_left_alone(env_id: str) -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    trajectory(gym.make(env_id), seed=0, num_steps=30)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]


@each_own_id
def test_a_pickled_copy_in_mid_episode_goes_on_alike(env_id: str) -> None:
    env = gym.make(env_id).unwrapped
    env.reset(seed=3)
    env.step(0)
    copy = pickle.loads(pickle.dumps(env))
    for _ in range(100):
        ours, theirs = env.step(1), copy.step(1)
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1:] == theirs[1:]
        if ours[2] or ours[3]:
            np.testing.assert_array_equal(env.reset()[0], copy.reset()[0])


@each_id
def test_the_spec_makes_the_same_environment_again(env_id: str) -> None:
    env = gym.make(env_id)
    assert env.spec is not None
    again = gym.make(env.spec)
    assert again.observation_space == env.observation_space
    assert trajectory(again, seed=1) == trajectory(env, seed=1)


@pytest.mark.parametrize(
    ("env_id", "parameters", "horizon", "size", "num_actions"),
    [
        ("xlstm_rl/TMaze-v0", {"corridor_length": 50}, 204, 4, 3),
        ("xlstm_rl/EndlessTMaze-v0", {"num_corridors": 3, "corridor_length": 5, "lengths": "uniform"}, 108, 3, 3),
        ("xlstm_rl/ColorCubes-v0", {"grid": 5, "num_cubes": 2, "num_phases": 3, "teleport": 0.2}, 54, 57, 5),
        ("xlstm_rl/RepeatFirst-v0", {"length": 9, "num_symbols": 6}, 9, 7, 6),
        ("xlstm_rl/RepeatFirst-v0", {"distractors": False}, 24, 5, 4),
        ("xlstm_rl/RepeatPrevious-v0", {"lag": 2, "length": 10, "num_symbols": 3}, 10, 4, 3),
        ("xlstm_rl/Parity-v0", {"length": 30}, 30, 3, 2),
        ("xlstm_rl/KeyValueRecall-v0", {"num_pairs": 3, "num_values": 5, "num_keys": 7}, 6, 13, 5),
        ("xlstm_rl/KeyValueRecall-v0", {"num_keys": 30, "key_exponent": 1.0}, 16, 35, 4),
        ("xlstm_rl/CueRecall-v0", {"delay": 3, "num_cues": 4}, 5, 5, 4),
        ("xlstm_rl/Copy-v0", {"num_items": 5, "num_symbols": 3}, 10, 4, 3),
        ("xlstm_rl/Overwrite-v0", {"num_keys": 3, "num_writes": 7, "num_values": 5}, 10, 9, 5),
        ("xlstm_rl/NearestSoFar-v0", {"num_items": 6, "num_values": 3, "dim": 4}, 8, 8, 3),
        ("xlstm_rl/Cycle-v0", {"modulus": 5, "num_moves": 9}, 10, 9, 5),
        ("xlstm_rl/ShellGame-v0", {"num_shells": 4, "num_swaps": 6}, 7, 29, 4),
        ("xlstm_rl/NoisyEvidence-v0", {"num_samples": 5, "accuracy": 0.8}, 6, 3, 2),
        ("xlstm_rl/KeyDoor-v0", {"delay": 30, "num_keys": 3, "noise": 1.0}, 32, 7, 3),
        ("xlstm_rl/Pairs-v0", {"num_pairs": 3, "num_turns": 5}, 14, 27, 6),
        ("xlstm_rl/Bandit-v0", {"num_pulls": 7, "better": 0.9}, 7, 3, 2),
    ],
)
def test_parameters_pass_through_make(
    env_id: str, parameters: dict[str, Any], horizon: int, size: int, num_actions: int
) -> None:
    env = gym.make(env_id, **parameters)
    facts = task_facts(env)
    assert facts is not None and facts.horizon == horizon
    assert env.observation_space.shape == (size,)
    assert env.action_space == gym.spaces.Discrete(num_actions)


@pytest.mark.parametrize("env_id", BOUNDED_IDS)
def test_facts_are_seen_through_wrappers_and_on_the_environment_itself(env_id: str) -> None:
    env = gym.make(env_id)
    wrapped = gym.wrappers.FrameStackObservation(gym.wrappers.RecordEpisodeStatistics(env), 2)
    facts = task_facts(wrapped)
    assert isinstance(facts, TaskFacts)
    assert facts is wrapped.get_wrapper_attr("facts") is env.unwrapped.facts  # type: ignore[attr-defined]


@pytest.mark.parametrize("env_id", ["CartPole-v1", *UNBOUNDED_IDS])
def test_environments_that_state_no_facts_have_none(env_id: str) -> None:
    assert task_facts(gym.make(env_id)) is None


@each_own_id
def test_text_is_a_render_mode(env_id: str) -> None:
    env = gym.make(env_id, render_mode="ansi")
    env.reset(seed=0)
    assert isinstance(env.render(), str)


@each_own_id
def test_pictures_are_a_render_mode(env_id: str) -> None:
    env = gym.make(env_id, render_mode="rgb_array")
    env.reset(seed=0)
    before = np.asarray(env.render())
    assert before.ndim == 3 and before.shape[-1] == 3 and before.dtype == np.uint8
    env.step(env.get_wrapper_attr("oracle_action")())
    assert not np.array_equal(before, np.asarray(env.render()))


@each_own_id
def test_lists_of_pictures_are_a_render_mode_of_gymnasium(env_id: str) -> None:
    env = gym.make(env_id, render_mode="rgb_array_list")
    env.reset(seed=0)
    env.step(0)
    frames: Any = env.render()
    assert len(frames) == 2 and np.asarray(frames[0]).dtype == np.uint8


@each_own_id
def test_rendering_without_a_mode_warns_and_gives_nothing(env_id: str) -> None:
    env = gym.make(env_id).unwrapped
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="without a render mode"):
        assert env.render() is None


@each_id
def test_stable_baselines3_vectorises_the_id(env_id: str) -> None:
    envs = make_vec_env(env_id, n_envs=2, seed=0)
    assert np.asarray(envs.reset()).shape == (2, *(envs.observation_space.shape or ()))
    envs.close()


@pytest.mark.parametrize("env_id", ["xlstm_rl/TMaze-v0", "xlstm_rl/CueRecall-v0", "xlstm_rl/CartPoleNoVelocity-v0"])
def test_worker_processes_find_the_ids_by_their_module_prefix(env_id: str) -> None:
    envs = make_vec_env(f"xlstm_rl.envs:{env_id}", n_envs=2, seed=0, vec_env_cls=SubprocVecEnv)
    try:
        observation = np.asarray(envs.reset())
        assert observation.shape == (2, *(envs.observation_space.shape or ()))
        for _ in range(60):
            _, _, dones, infos = envs.step(np.array([1, 0]))
            assert all(("terminal_observation" in info) == done for info, done in zip(infos, dones, strict=True))
    finally:
        envs.close()


@each_own_id
def test_gymnasium_vectorises_the_environment(env_id: str) -> None:
    envs = gym.make_vec(env_id, num_envs=3, vectorization_mode="sync")
    observation, _ = envs.reset(seed=0)
    for _ in range(30):
        observation, *_ = envs.step(envs.action_space.sample())
    assert observation.shape[0] == 3 and observation.dtype == np.float32
    envs.close()


@each_id
def test_every_task_names_its_hidden_variable(env_id: str) -> None:
    env, twin = gym.make(env_id), gym.make(env_id)
    values: set[int] = set()
    for seed in range(20):
        env.reset(seed=seed)
        twin.reset(seed=seed)
        env.action_space.seed(seed)
        ended = False
        while not ended and len(values) < 2:
            value = env.get_wrapper_attr("hidden_variable")()
            assert isinstance(value, int) and value >= 0
            values.add(value)
            action = env.action_space.sample()
            seen, *_, terminated, truncated, _ = env.step(action)
            # to look at it changes nothing
            np.testing.assert_array_equal(seen, twin.step(action)[0])
            ended = terminated or truncated
    assert len(values) > 1
    assert env.get_wrapper_attr("hidden_name").islower() or env_id.endswith("Pairs-v0")


def test_hidden_variables_of_streams_are_what_the_stream_makes_of_what_was_shown() -> None:
    parity: Any = gym.make("xlstm_rl/Parity-v0").unwrapped
    for seed in range(4):
        seen, _ = parity.reset(seed=seed)
        so_far = 0
        for _ in range(parity.length):
            so_far ^= int(seen[1] > seen[0])
            assert parity.hidden_variable() == so_far
            seen = parity.step(0)[0]
    for name, size in (("ShellGame", 3), ("Cycle", 7)):
        env: Any = gym.make(f"xlstm_rl/{name}-v0").unwrapped
        seen, _ = env.reset(seed=1)
        assert env.hidden_variable() == seen[:size].argmax()
        env.step(0)
        assert env.hidden_variable() == env.oracle_action()
    recall: Any = gym.make("xlstm_rl/KeyValueRecall-v0").unwrapped
    seen, _ = recall.reset(seed=0)
    first = int(seen[8:12].argmax())
    assert [recall.hidden_variable() for _ in range(recall.length) if recall.step(0)] == [first] * recall.length
    writes: Any = gym.make("xlstm_rl/Overwrite-v0").unwrapped
    seen, _ = writes.reset(seed=0)
    last = 4
    for _ in range(writes.length):
        if seen[0] and seen[6:10].any():
            last = int(seen[6:10].argmax())
        assert writes.hidden_variable() == last
        seen = writes.step(0)[0]


def test_the_package_imports_neither_torch_nor_stable_baselines3() -> None:
    code = (
        "import importlib.util, pathlib, sys, types\n"
        "root = types.ModuleType('xlstm_rl'); root.__path__ = [sys.argv[1]]; sys.modules['xlstm_rl'] = root\n"
        "import xlstm_rl.envs\n"
        "print(sorted({'torch', 'stable_baselines3', 'pygame'} & set(sys.modules)))\n"
        "print(sorted(m for m in sys.modules if m.startswith('xlstm_rl.') and not m.startswith('xlstm_rl.envs')))\n"
    )
    import xlstm_rl.envs

    folder = str(xlstm_rl.envs.__path__[0].rsplit("/", 1)[0])
    result = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n[]\n"
