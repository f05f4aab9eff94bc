"""Episodes are recorded as they were played, and read from Minari datasets."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from xlstm_rl import MemoryInputs, RecurrentPPO, imitate, imitation_loss, record_demonstrations
from xlstm_rl.cli import main
from xlstm_rl.configs import ConfigError, load
from xlstm_rl.imitation.demonstrations import Oracle, read_minari, with_memory_inputs
from xlstm_rl.imitation.imitated_run import imitate_run
from xlstm_rl.runs.train import evaluate_run
from xlstm_rl.vec_envs.inputs import InputLayout

TASK = "xlstm_rl/KeyDoor-v0"


class Always:
    """One action for ever."""

    def predict(self, observation: Any, episode_start: np.ndarray, **_: Any) -> tuple[np.ndarray, None]:
        return np.ones(len(episode_start), int), None


def test_recorded_episodes_are_those_of_the_environment() -> None:
    episodes = record_demonstrations(make_vec_env(TASK, 2), 5, seed=7)
    assert len(episodes) == 5
    env = gym.make(TASK)
    obs, _ = env.reset(seed=8)
    for episode in episodes[2:]:
        # the second environment plays three of the five, and has the second seed
        assert np.array_equal(episode.observations[0], obs)
        for t, action in enumerate(episode.actions):
            obs, reward, terminated, truncated, _ = env.step(action)
            assert np.array_equal(episode.observations[t + 1], obs) and episode.rewards[t] == pytest.approx(reward)
            assert (episode.terminations[t], episode.truncations[t]) == (terminated, truncated)
        assert terminated
        obs, _ = env.reset()


def test_a_player_that_sees_normalised_observations_is_recorded_without() -> None:
    env = VecNormalize(make_vec_env(TASK, 2), clip_obs=0.5)
    env.reset()
    running: Any = env.obs_rms
    env.training, mean = False, running.mean.copy()
    seen = []

    class Looking(Always):
        def predict(self, observation: Any, episode_start: np.ndarray, **_: Any) -> tuple[np.ndarray, None]:
            seen.append(observation)
            return super().predict(observation, episode_start)

    inner = env.venv
    episodes = record_demonstrations(env, 4, Looking(), seed=7)
    expected = record_demonstrations(make_vec_env(TASK, 2), 4, Always(), seed=7)
    for episode, other in zip(episodes, expected, strict=True):
        assert np.array_equal(episode.observations, other.observations)
        assert np.array_equal(episode.rewards, other.rewards)
    assert np.abs(seen).max() <= 0.5 and env.venv is inner
    assert np.array_equal(mean, running.mean)


def test_time_limits_are_told_from_ends() -> None:
    env = make_vec_env(lambda: gym.make("CartPole-v1", max_episode_steps=5), 2)
    episodes = record_demonstrations(env, 4, Always(), seed=0)
    for episode in episodes:
        assert len(episode.observations) == len(episode.actions) + 1 == 6
        assert episode.truncations.tolist() == [False] * 4 + [True] and not episode.terminations.any()


def test_the_oracle_of_every_suite_task_that_has_one_can_be_recorded() -> None:
    for name in ("TMaze", "Pairs", "Bandit", "Overwrite"):
        (episode,) = record_demonstrations(gym.make(f"xlstm_rl/{name}-v0"), 1, seed=0)
        assert episode.terminations[-1] or episode.truncations[-1]


def test_an_environment_without_an_oracle_is_told() -> None:
    with pytest.raises(ValueError, match=r"a method oracle_action\(\)"):
        Oracle(make_vec_env("CartPole-v1", 1))


def test_memory_inputs_can_be_added_afterwards() -> None:
    plain = record_demonstrations(make_vec_env(TASK, 2), 3, seed=1)
    wrapped = record_demonstrations(make_vec_env(TASK, 2, wrapper_class=MemoryInputs), 3, seed=1)
    env = gym.make(TASK)
    layout = InputLayout(env.observation_space, env.action_space, ("action", "reward", "start"))
    for episode, expected in zip(plain, wrapped, strict=True):
        added = with_memory_inputs(episode, layout)
        assert np.array_equal(added.actions, expected.actions)
        assert added.observations.keys() == expected.observations.keys()
        for key, part in expected.observations.items():
            assert np.allclose(added.observations[key], part), key


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of a local Minari dataset of 20 episodes of the oracle."""
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    env = gym.make(TASK)
    episodes = record_demonstrations(env, 20, seed=0)
    buffers = [minari.data_collector.EpisodeBuffer(id=i, **one._asdict()) for i, one in enumerate(episodes)]
    about = dict.fromkeys(("algorithm_name", "code_permalink", "author", "author_email", "description"), "oracle")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers("keydoor/oracle-v0", buffers, env=env, **about)
    return "keydoor/oracle-v0"


def test_a_minari_dataset_holds_the_same_episodes(dataset: str) -> None:
    episodes, model = record_demonstrations(gym.make(TASK), 20, seed=0), RecurrentPPO("MlpXLSTMPolicy", TASK, seed=0)
    read = read_minari(dataset)
    assert imitation_loss(model, read) == imitation_loss(model, episodes)
    assert imitate(model, read, epochs=1) == imitate(RecurrentPPO("MlpXLSTMPolicy", TASK, seed=0), episodes, epochs=1)


@pytest.mark.parametrize("dataset_id", ["keydoor/oracle-v1", "nowhere", "a/b"])
def test_a_dataset_that_is_not_here_is_told_and_not_fetched(dataset: str, dataset_id: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"there are: keydoor/oracle-v0; .* minari download"):
        read_minari(dataset_id)


SMALL = [
    "ppo.batch_size=64",
    "memory.hidden_size=16",
    "env.n_envs=2",
    "eval.n_episodes=2",
    "eval.interim_episodes=2",
    "eval.n_envs=2",
]


def test_agents_imitate_a_dataset_with_memory_inputs(dataset: str, tmp_path: Path) -> None:
    config = load("KeyDoor-v0", [*SMALL, "env.memory_inputs=[action, start]"])
    folder = imitate_run(config, dataset, tmp_path / "run", epochs=1)
    assert evaluate_run(folder)[0].episodes == 2


def test_ppo_goes_on_from_a_clone_of_the_oracle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, words = str(tmp_path / "clone"), [*SMALL, "seed=3"]
    assert main(["imitate", "KeyDoor-v0", *words, "--from", "oracle", "--episodes", "20", "--run-dir", run]) == 0
    said = capsys.readouterr().out
    assert "18 episodes to learn from, 2 held out" in said and "epoch 20 of 20: loss" in said
    losses = [float(loss) for loss in re.findall(r"loss (\S+) nats", said)]
    assert losses[-1] < losses[0]
    command = re.findall(r"go on by PPO with: xlstm-rl (.*)", said)[0]
    assert f"init.from={run}" in command
    small = ["total_steps=64", "ppo.n_steps=32", "ppo.batch_size=32", "--run-dir", str(tmp_path / "ppo")]
    assert main([*shlex.split(command), *small]) == 0
    assert "weights taken; statistics of observations taken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("CartPole-v1", "oracle", "--from oracle: the environment has no oracle"),
        ("KeyDoor-v0", "nowhere/none-v0", "--from nowhere/none-v0: "),
    ],
)
def test_sources_that_are_not_there_are_told(name: str, source: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        imitate_run(load(name, SMALL), source, tmp_path / "run", epochs=1)
    assert not (tmp_path / "run").exists()


def test_a_dataset_of_another_task_is_refused(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--from {dataset}: the observations of episode 0 are of shape"):
        imitate_run(load("CueRecall-v0", SMALL), dataset, tmp_path / "run", epochs=1)
    assert not (tmp_path / "run").exists()
