"""RLlib's algorithms with the module: what they compute, what they learn, what their checkpoints hold."""

from __future__ import annotations

import logging
import os
import pickle
import re
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

from tests.conftest import assert_close
from xlstm_rl import CheckpointError, RecurrentPPO, evaluate

if find_spec("ray") is None:
    pytest.skip("ray is not installed", allow_module_level=True)

import ray
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.connectors.env_to_module import FlattenObservations
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.tune.registry import register_env

from xlstm_rl.rllib import XLSTMRLModule, keep_states_at_row_starts, load_weights, save_weights

ROOT = Path(__file__).parents[2]
COMPONENT = "learner_group/learner/rl_module/default_policy"
POLICY: dict[str, Any] = {"memory_kwargs": {"blocks": "m", "hidden_size": 32}, "net_arch": [32]}


def _maze(settings: Any) -> gymnasium.Env[Any, Any]:
    # the workers know nothing of it else
    import xlstm_rl

    assert xlstm_rl.__version__
    return gymnasium.make("xlstm_rl/TMaze-v0", **settings)


@pytest.fixture(autouse=True, scope="module")
def cluster() -> Iterator[None]:
    register_env("maze", _maze)
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=200_000_000,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}},
    )
    yield
    ray.shutdown()


def configured(config: Any, *, lean: bool = True, runners: int = 0, max_seq_len: int = 16, **policy: Any) -> Any:
    settings = {"max_seq_len": max_seq_len, **(policy or POLICY)}
    config.environment("maze", env_config={"corridor_length": 6})
    config.env_runners(num_env_runners=runners, num_envs_per_env_runner=4)
    config.rl_module(rl_module_spec=RLModuleSpec(module_class=XLSTMRLModule, model_config=settings))
    config.debugging(seed=0, log_level="ERROR")
    return keep_states_at_row_starts(config) if lean else config


def ppo(**settings: Any) -> Any:
    config = configured(PPOConfig(), **settings)
    return config.training(
        train_batch_size_per_learner=512, minibatch_size=256, num_epochs=2, lr=1e-3, use_kl_loss=False, grad_clip=0.5
    )


@contextmanager
def built(config: Any) -> Iterator[Any]:
    algorithm = config.build_algo()
    try:
        yield algorithm
    finally:
        algorithm.stop()


def weights(algorithm: Any) -> dict[str, Tensor]:
    """Of the learner."""
    state = algorithm.learner_group.get_state()["learner"]["rl_module"]["default_policy"]
    return {name: torch.as_tensor(value) for name, value in state.items()}


_DIFFERENCES: list[tuple[float, int, int]] = []


class Watching(PPOTorchLearner):  # type: ignore[misc]
    """Notes how far the log-probabilities of training are from those of sampling, and the rows, where they count."""

    def compute_loss_for_module(self, *, module_id: str, config: Any, batch: Any, fwd_out: Any) -> Any:
        module = self.module[module_id].unwrapped()
        distribution = module.get_train_action_dist_cls().from_logits(fwd_out[Columns.ACTION_DIST_INPUTS])
        difference = (distribution.logp(batch[Columns.ACTIONS]) - batch[Columns.ACTION_LOGP]).abs()
        in_midst = torch.stack([part.flatten(1).abs().sum(1) > 0 for part in batch[Columns.STATE_IN].values()]).any(0)
        worst = float(difference[batch[Columns.LOSS_MASK]].max().detach())
        _DIFFERENCES.append((worst, len(difference), int(in_midst.sum())))
        return super().compute_loss_for_module(module_id=module_id, config=config, batch=batch, fwd_out=fwd_out)


@pytest.mark.slow
@pytest.mark.parametrize("lean", [False, True], ids=["all states", "states at row starts"])
@pytest.mark.parametrize("mode", ["truncate_episodes", "complete_episodes"])
@pytest.mark.parametrize("blocks", ["m", "sm"])
def test_training_starts_from_the_probabilities_of_sampling(blocks: str, mode: str, lean: bool) -> None:
    config = ppo(lean=lean, max_seq_len=3, memory_kwargs={"blocks": blocks, "hidden_size": 32})
    config.env_runners(batch_mode=mode)
    config.training(learner_class=Watching, num_epochs=1, minibatch_size=512)
    with built(config) as algorithm:
        # the second batch begins in the midst of episodes
        for _ in range(2):
            _DIFFERENCES.clear()
            algorithm.train()
            worst, rows, in_midst = _DIFFERENCES[0]
            assert worst < 1e-5 and in_midst > rows // 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["truncate_episodes", "complete_episodes"])
def test_states_at_row_starts_are_all_that_training_needs(mode: str) -> None:
    found, sizes = [], []
    for lean in (False, True):
        config = ppo(lean=lean, max_seq_len=3)
        # a time limit ends some episodes where a row ends
        config.environment("maze", env_config={"corridor_length": 6, "max_episode_steps": 6})
        config.env_runners(batch_mode=mode)
        with built(config) as algorithm:
            for _ in range(3):
                algorithm.train()
            found.append(weights(algorithm))
            sizes.append(len(pickle.dumps(algorithm.env_runner.sample(num_timesteps=512))))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert sizes[1] < sizes[0] / 2


def test_connectors_set_before_come_first() -> None:
    config = ppo(lean=False).env_runners(env_to_module_connector=lambda env, spaces, device: FlattenObservations())
    config.environment("CartPole-v1")
    keep_states_at_row_starts(config)
    pieces = config.build_env_to_module_connector(env=gymnasium.make_vec("CartPole-v1", 2))
    names = [type(piece).__name__ for piece in pieces.connectors]
    assert names.index("FlattenObservations") < names.index("StateNow") < names.index("NumpyToTensor")


def test_states_at_row_starts_are_for_one_agent() -> None:
    config = PPOConfig().multi_agent(policies={"a", "b"})
    with pytest.raises(ValueError, match="one agent"):
        keep_states_at_row_starts(config)


def test_episodes_without_states_are_refused() -> None:
    with built(ppo(lean=False)) as plain, built(ppo()) as lean:
        episodes = plain.env_runner.sample(num_timesteps=64)
        with pytest.raises(ValueError, match="not collected under keep_states_at_row_starts"):
            lean.learner_group.update(episodes=episodes)


@pytest.mark.slow
def test_short_memory_task_is_learned_by_two_env_runners_and_goes_on_in_the_library(tmp_path: Path) -> None:
    config = ppo(runners=2, memory_kwargs={"blocks": "m", "hidden_size": 64})
    config.training(train_batch_size_per_learner=2048, num_epochs=4, entropy_coeff=0.01)
    with built(config) as algorithm:
        best = -1.0
        for _ in range(15):
            best = max(best, algorithm.train()["env_runners"]["episode_return_mean"])
            if best >= 0.97:
                break
        algorithm.save_to_path(str(tmp_path))
    # a guess gives 0.5
    assert best >= 0.9
    env = make_vec_env("xlstm_rl/TMaze-v0", 8, env_kwargs={"corridor_length": 6})
    model = RecurrentPPO("MlpXLSTMPolicy", env, policy_kwargs={"memory_kwargs": {"blocks": "m", "hidden_size": 64}})
    load_weights(model.policy, tmp_path)
    assert evaluate(model, env, 100, seed=1).returns.mean() >= 0.9
    # 100 fair coins: beyond 0.75 once in 3 million
    assert evaluate(model, env, 100, empty_state_every_step=True, seed=1).returns.mean() < 0.75
    model.learn(1_000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [APPOConfig, IMPALAConfig])
def test_asynchronous_algorithms_train_the_module(kind: Any) -> None:
    config = configured(kind(), runners=1).training(train_batch_size_per_learner=200, lr=1e-3)
    config.reporting(min_time_s_per_iteration=1)
    with built(config) as algorithm:
        before = weights(algorithm)
        for _ in range(20):
            algorithm.train()
            after = weights(algorithm)
            if not torch.equal(after["policy.value_net.weight"], before["policy.value_net.weight"]):
                break
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert {name.partition(".")[2].partition(".")[0] for name in changed} >= {"memory_actor", "action_net", "value_net"}
    assert all(bool(value.isfinite().all()) for value in after.values())


@pytest.mark.slow
def test_two_learners_train_the_module() -> None:
    with built(ppo().learners(num_learners=2, num_gpus_per_learner=0)) as algorithm:
        before = weights(algorithm)
        algorithm.train()
        after = weights(algorithm)
    assert not torch.equal(before["policy.action_net.weight"], after["policy.action_net.weight"])


def fresh_model(**policy: Any) -> RecurrentPPO:
    env = make_vec_env("xlstm_rl/TMaze-v0", 1, env_kwargs={"corridor_length": 6})
    return RecurrentPPO("MlpXLSTMPolicy", env, policy_kwargs=policy or POLICY, seed=3)


def inputs(module: Any) -> Tensor:
    """What the module makes of some observations."""
    obs = torch.rand(2, 7, *module.observation_space.shape, generator=torch.Generator().manual_seed(0))
    state = {
        name: torch.from_numpy(part[None]).repeat(2, *[1] * part.ndim)
        for name, part in module.get_initial_state().items()
    }
    with torch.no_grad():
        found: Tensor = module.forward_inference({Columns.OBS: obs, Columns.STATE_IN: state})[
            Columns.ACTION_DIST_INPUTS
        ]
    return found


def test_weights_go_to_a_checkpoint_and_back(tmp_path: Path) -> None:
    model = fresh_model()
    save_weights(model.policy, tmp_path / "ours")
    with built(ppo()) as algorithm:
        algorithm.restore_from_path(str(tmp_path / "ours"), component=COMPONENT)
        for name, value in model.policy.state_dict().items():
            assert torch.equal(weights(algorithm)[f"policy.{name}"], value), name
        runner = algorithm.env_runner.module
        assert_close(runner.policy.action_net.weight, model.policy.action_net.weight)
        theirs = algorithm.save_to_path(str(tmp_path / "theirs"))
        module = runner.save_to_path(str(tmp_path / "module"))
    for checkpoint in (theirs, module):
        other = fresh_model()
        torch.nn.init.zeros_(other.policy.value_net.weight)
        load_weights(other.policy, checkpoint)
        assert_close(list(other.policy.state_dict().values()), list(model.policy.state_dict().values()))


@pytest.mark.slow
def test_algorithm_restored_from_a_checkpoint_acts_alike(tmp_path: Path) -> None:
    with built(ppo()) as algorithm:
        algorithm.train()
        expected = inputs(algorithm.get_module())
        algorithm.save_to_path(str(tmp_path))
    with built(ppo()) as other:
        assert not torch.allclose(inputs(other.get_module()), expected)
        other.restore_from_path(str(tmp_path))
        assert_close(inputs(other.get_module()), expected)


def test_no_code_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / "module_state.pkl").write_bytes(pickle.dumps({"policy.x": Evil()}))
    with pytest.raises(CheckpointError, match=r"posix\.mkdir.*only arrays"):
        load_weights(fresh_model().policy, tmp_path)
    assert not (tmp_path / "made").exists()


def test_checkpoints_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    model = fresh_model()
    with pytest.raises(CheckpointError, match="no weights of a module 'default_policy'"):
        load_weights(model.policy, tmp_path)
    save_weights(model.policy, tmp_path)
    other = fresh_model(memory_kwargs={"blocks": "m", "hidden_size": 16}, net_arch=[32])
    with pytest.raises(CheckpointError, match="its settings need"):
        load_weights(other.policy, tmp_path)
    file = tmp_path / "module_state.pkl"
    whole = file.read_bytes()
    for torn in (whole[: len(whole) // 2], b"", b"\x80\x04K\x01.", pickle.dumps({"policy.x": 1.0})):
        file.write_bytes(torn)
        with pytest.raises(CheckpointError, match=r"module_state\.pkl"):
            load_weights(model.policy, tmp_path)


def test_policy_for_images_takes_the_weights_of_a_module_that_sees_them_in_rllibs_order(tmp_path: Path) -> None:
    pixels = spaces.Box(0, 255, (36, 40, 3), np.uint8)
    config = {"max_seq_len": 4, **POLICY}
    spec = RLModuleSpec(
        module_class=XLSTMRLModule,
        observation_space=pixels,
        action_space=spaces.Discrete(2),
        model_config=config,
    )
    module = spec.build()
    torch.nn.init.normal_(module.policy.action_net.weight)
    save_weights(module.policy, tmp_path)
    env = DummyVecEnv([lambda: FakeImageEnv(2, 36, 40, 3, discrete=True)])
    model = RecurrentPPO("CnnXLSTMPolicy", env, policy_kwargs=POLICY)
    load_weights(model.policy, tmp_path)
    pixels.seed(0)
    image = pixels.sample()
    state = {name: torch.from_numpy(part[None]) for name, part in module.get_initial_state().items()}
    batch = {Columns.OBS: torch.from_numpy(image[None, None]), Columns.STATE_IN: state}
    logits = module.forward_inference(batch)[Columns.ACTION_DIST_INPUTS][0, 0]
    obs, _ = model.policy.obs_to_tensor(image)
    latents = model.policy.latents(obs, model.policy.initial_state(1), torch.ones(1, dtype=torch.bool))
    assert_close(model.policy.action_net(latents.actor)[0], logits)


# RLlib registers its environment anew for every algorithm
@pytest.mark.filterwarnings("ignore:.*Overriding environment rllib")
@pytest.mark.slow
def test_page_on_rllib_runs_and_so_does_its_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/rllib.md").read_text(encoding="utf-8").replace("20_000", "256")
    page = page.replace('"for_rllib"', repr(str(tmp_path / "for_rllib")))
    names: dict[str, Any] = {"__name__": "docs/rllib.md"}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block.replace("range(10)", "range(1)"), names)
    assert (tmp_path / "for_rllib" / "module_state.pkl").is_file()
    script = runpy.run_path(str(ROOT / "examples/rllib_train.py"))
    for memory in ("gru", "rllib-lstm"):
        given = ["--memory", memory, "--runners", "0", "--steps", "100", "--save", str(tmp_path / memory)]
        script["train"](script["arguments"](given))
        assert (tmp_path / memory / "rllib_checkpoint.json").is_file()
    assert capsys.readouterr().out.count("steps/s") == 2
