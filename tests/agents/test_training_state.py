"""Whatever decides how training goes on is in the file, or is missed aloud."""

import io
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import ClipReward, NormalizeObservation
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize

from tests.agents.small_agents import agent, assert_same
from tests.agents.spaces_for_tests import vec_env
from tests.agents.test_resume import N_ENVS, N_STEPS, assert_same_run, envs, learner
from xlstm_rl.agents import CheckpointError, LossTerm, RecurrentPPO, register_loss
from xlstm_rl.agents.checkpoint import describe_part
from xlstm_rl.vec_envs.gymnasium_vector import GymnasiumVecEnv

ROLLOUT = N_ENVS * N_STEPS


def freeze_memory(model: RecurrentPPO) -> None:
    model.policy.memory_actor.requires_grad_(False)


def freeze_extractor(model: RecurrentPPO) -> None:
    next(iter(model.policy.memory_actor.parameters())).requires_grad_(False)
    model.policy.value_net.requires_grad_(False)


def rates_by_part(model: RecurrentPPO) -> None:
    memory = list(model.policy.memory_actor.parameters())
    known = {id(weight) for weight in memory}
    rest = [weight for weight in model.policy.parameters() if id(weight) not in known]
    groups = [{"params": rest, "lr": 1e-3, "betas": (0.5, 0.9)}, {"params": memory, "lr": 1e-4, "weight_decay": 0.1}]
    model.policy.optimizer = torch.optim.AdamW(groups, eps=1e-4, amsgrad=True)


def added_group(model: RecurrentPPO) -> None:
    values = list(model.policy.value_net.parameters())
    rest = [weight for weight in model.policy.parameters() if all(weight is not value for value in values)]
    model.policy.optimizer = torch.optim.SGD(rest, lr=1e-2, momentum=0.9)
    model.policy.optimizer.add_param_group({"params": values, "lr": 1e-3})


def other_schedule(model: RecurrentPPO) -> None:
    model.lr_schedule = FloatSchedule(LinearSchedule(1e-2, 1e-4, 0.5))


def other_learning_rate(model: RecurrentPPO) -> None:
    # without effect until the schedule is made anew, here as after loading
    model.learning_rate = 1.0


def other_settings(model: RecurrentPPO) -> None:
    model.n_epochs, model.batch_size, model.target_kl, model.ent_coef = 1, 15, 0.01, 0.1
    model.gamma, model.gae_lambda, model.vf_coef, model.max_grad_norm = 0.7, 0.5, 0.1, 0.01
    model.clip_range, model.clip_range_vf = FloatSchedule(0.05), FloatSchedule(LinearSchedule(0.3, 0.1, 1.0))
    model.advantage_floor, model.grad_spike_factor, model.normalize_advantage = 0.5, None, False


def shorter_sequences(model: RecurrentPPO) -> None:
    model.seq_len = 3


def normalizer_settings(model: RecurrentPPO) -> None:
    normalizer = model.get_vec_normalize_env()
    assert normalizer is not None
    normalizer.clip_obs, normalizer.clip_reward, normalizer.gamma, normalizer.epsilon = 0.5, 0.7, 0.6, 1e-2


def statistics_stand_still(model: RecurrentPPO) -> None:
    normalizer = model.get_vec_normalize_env()
    assert normalizer is not None
    normalizer.training = False


def rewards_as_they_are(model: RecurrentPPO) -> None:
    normalizer = model.get_vec_normalize_env()
    assert normalizer is not None
    normalizer.norm_reward = False


def observations_as_they_are(model: RecurrentPPO) -> None:
    normalizer = model.get_vec_normalize_env()
    assert normalizer is not None
    normalizer.norm_obs = False


CHANGES: list[Callable[[RecurrentPPO], None]] = [
    *(freeze_memory, freeze_extractor, rates_by_part, added_group, other_schedule, other_learning_rate),
    *(other_settings, shorter_sequences, normalizer_settings, statistics_stand_still, rewards_as_they_are),
    observations_as_they_are,
]


@pytest.mark.parametrize("before_training", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_was_changed_by_hand_is_resumed(change: Callable[[RecurrentPPO], None], before_training: bool) -> None:
    def env() -> VecEnv:
        return VecNormalize(envs(), gamma=0.9)

    whole, file = learner(env()), io.BytesIO()
    if before_training:
        change(whole)
    whole.learn(2 * ROLLOUT)
    if not before_training:
        change(whole)
    whole.save_checkpoint(file)
    whole.learn(2 * ROLLOUT, reset_num_timesteps=False)
    parts = RecurrentPPO.resume(file, env(), device="cpu")
    parts.learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert_same_run(whole, parts)


@pytest.mark.parametrize("change", [freeze_memory, rates_by_part, added_group], ids=lambda change: change.__name__)
def test_what_was_changed_by_hand_is_loaded(change: Callable[[RecurrentPPO], None]) -> None:
    model, file = agent(steps=24), io.BytesIO()
    change(model)
    model.learn(24)
    model.save(file)
    other = RecurrentPPO.load(file, vec_env(), device="cpu")
    assert_same(model, other)
    frozen = [[weight.requires_grad for weight in one.policy.parameters()] for one in (model, other)]
    assert frozen[0] == frozen[1]
    assert type(model.policy.optimizer) is type(other.policy.optimizer)


def test_frozen_weights_of_a_policy_alone_come_back(tmp_path: Any) -> None:
    model = agent()
    freeze_memory(model)
    model.policy.save(str(tmp_path / "policy.zip"))
    other = type(model.policy).load(str(tmp_path / "policy.zip"))
    assert not any(weight.requires_grad for weight in other.memory_actor.parameters())
    assert all(weight.requires_grad for weight in other.value_net.parameters())


def test_precision_of_the_weights_comes_back() -> None:
    model, file = agent(), io.BytesIO()
    model.policy.double()
    model.policy.value_net.weight.data += 1e-12
    model.save(file)
    other = RecurrentPPO.load(file, device="cpu")
    assert all(map(torch.equal, model.policy.parameters(), other.policy.parameters()))


def test_rates_by_part_keep_their_ratio_under_a_schedule() -> None:
    model = learner(envs(), learning_rate=LinearSchedule(1e-3, 0.0, 1.0))
    rates_by_part(model)
    rates: list[tuple[float, float]] = []
    step = model.policy.optimizer.step

    def note(*args: Any, **kwargs: Any) -> Any:
        first, second = model.policy.optimizer.param_groups
        rates.append((first["lr"], second["lr"]))
        return step(*args, **kwargs)

    model.policy.optimizer.step = note  # type: ignore[method-assign]
    model.learn(4 * ROLLOUT)
    assert len({first for first, _ in rates}) == 4
    assert rates[0] == pytest.approx((0.75e-3, 0.75e-4))
    for first, second in rates:
        assert second == pytest.approx(first / 10)


def test_rate_of_a_part_that_is_set_between_rollouts_is_kept() -> None:
    model = agent()
    rates_by_part(model)
    model.learn(24)
    model.policy.optimizer.param_groups[1]["lr"] = 1e-5
    model.learn(24)
    assert [group["lr"] for group in model.policy.optimizer.param_groups] == pytest.approx([1e-3, 1e-5])


def test_rates_by_part_outlast_a_schedule_that_begins_and_ends_with_zero() -> None:
    model = agent(learning_rate=LinearSchedule(0.0, 1e-3, 1.0))
    rates_by_part(model)
    model.learn(48)
    model.learn(48)
    first, second = model.policy.optimizer.param_groups
    assert first["lr"] == pytest.approx(10 * second["lr"])
    assert first["lr"] > 0


def test_a_single_group_follows_the_learning_rate() -> None:
    model = agent()
    model.policy.optimizer.param_groups[0]["lr"] = 1.0
    model.learn(24)
    assert model.policy.optimizer.param_groups[0]["lr"] == 3e-4


OPTIMIZERS = [
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop"),
    *("Rprop", "SGD"),
]


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if hasattr(torch.optim, name)])
def test_optimiser_of_any_class_that_was_put_in_comes_back(name: str) -> None:
    model, file = agent(), io.BytesIO()
    model.policy.optimizer = getattr(torch.optim, name)(model.policy.parameters(), lr=1e-3)
    model.learn(24)
    model.save(file)
    assert_same(model, RecurrentPPO.load(file, device="cpu"))


class OwnAdam(torch.optim.Adam):
    """Of a class that no file may name."""


class Whitened(torch.optim.Optimizer):
    """Keeps for every weight what has another shape, and lists."""

    def __init__(self, params: Any, lr: float = 1e-3, eps: float = 1e-5) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["outer"] = torch.outer(weight.data.flatten()[:2], weight.data.flatten()[:2]) - 1.0
                self.state[weight]["history"] = [1, weight.data.clone()]
                weight.data -= group["lr"] * weight.grad


def own_class(model: RecurrentPPO) -> None:
    model.policy.optimizer = OwnAdam(model.policy.parameters(), lr=1e-3)


def further_weights(model: RecurrentPPO) -> None:
    model.policy.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})


@pytest.mark.parametrize("change", [own_class, further_weights], ids=lambda change: change.__name__)
def test_weights_can_be_had_where_the_optimiser_cannot(change: Callable[[RecurrentPPO], None], tmp_path: Any) -> None:
    model = agent()
    change(model)
    model.learn(24)
    model.save(tmp_path / "model")
    with pytest.warns(UserWarning, match="the weights are loaded, the optimiser starts anew") as warned:
        loaded = RecurrentPPO.load(tmp_path / "model", vec_env(), device="cpu")
    assert warned[0].filename == __file__
    other = agent(seed=1, steps=24)
    with pytest.raises(ValueError, match="exact_match=False takes the weights"):
        other.set_parameters(str(tmp_path / "model"))
    with pytest.warns(UserWarning, match="the optimiser starts anew"):
        other.set_parameters(str(tmp_path / "model"), exact_match=False)
    for there in (loaded, other):
        assert all(map(torch.equal, model.policy.parameters(), there.policy.parameters()))
        assert not there.policy.optimizer.state
        there.learn(24)


def test_parameters_of_an_agent_with_rates_by_part_fit_one_without(tmp_path: Any) -> None:
    model = agent()
    rates_by_part(model)
    model.learn(24)
    model.save(tmp_path / "model")
    other = agent(seed=1)
    other.set_parameters(str(tmp_path / "model"))
    assert_same(model, other)


@pytest.mark.parametrize("kind", [OwnAdam, Whitened])
def test_own_class_of_optimiser_that_is_handed_over_comes_back(
    kind: type[torch.optim.Optimizer], tmp_path: Any
) -> None:
    model = agent(steps=24, policy_kwargs={"optimizer_class": kind})
    model.save(tmp_path / "model")
    given = {"policy_kwargs": {"optimizer_class": kind}}
    other = RecurrentPPO.load(tmp_path / "model", vec_env(), custom_objects=given, device="cpu")
    assert all(map(torch.equal, model.policy.parameters(), other.policy.parameters()))
    before, after = model.policy.optimizer.state_dict(), other.policy.optimizer.state_dict()
    assert describe_part(before).tree == describe_part(after).tree
    other.learn(24)


def test_optimiser_can_be_left_unread(tmp_path: Any) -> None:
    model = agent(steps=24)
    next(iter(model.policy.optimizer.state.values()))["exp_avg"][...] = float("nan")
    model.save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="NaN in 'state.0.exp_avg'"):
        RecurrentPPO.load(tmp_path / "model")
    other = RecurrentPPO.load(tmp_path / "model", custom_objects={"policy.optimizer": None}, device="cpu")
    assert all(map(torch.equal, model.policy.parameters(), other.policy.parameters()))
    assert not other.policy.optimizer.state


class Counting(VecEnvWrapper):
    """Scales rewards by how many steps there were, which no file holds."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.seen = 0

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        self.seen += 1
        return self.venv.step_wait()


class Telling(Counting):
    def get_state(self) -> int:
        return self.seen

    def set_state(self, state: int) -> None:
        self.seen = state


def test_wrapper_whose_state_is_in_no_file_is_named() -> None:
    model, file = learner(Counting(envs()), learning_rate=1e-3).learn(ROLLOUT), io.BytesIO()
    model.save_checkpoint(file)
    with pytest.warns(UserWarning, match="Counting starts anew with other values of seen"):
        RecurrentPPO.resume(file, Counting(envs()), device="cpu")


@pytest.mark.filterwarnings("ignore:all environments start new episodes")
@pytest.mark.parametrize("inside", (False, True))
def test_statistics_of_vector_wrappers_of_gymnasium_are_named(inside: bool) -> None:
    def normalized() -> VecEnv:
        bare: Any = SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 2, autoreset_mode=AutoresetMode.NEXT_STEP)
        wrapped: Any = NormalizeObservation(bare)
        return GymnasiumVecEnv(ClipReward(wrapped, -1.0, 1.0) if inside else wrapped)

    model, file = agent(env=normalized(), n_steps=8, batch_size=16), io.BytesIO()
    model.learn(16)
    model.save_checkpoint(file)
    with pytest.warns(
        UserWarning, match="statistics of gymnasium's vector wrapper NormalizeObservation are in no file"
    ):
        RecurrentPPO.resume(file, normalized())


def test_wrapper_that_tells_its_state_is_brought_back() -> None:
    model, file, env = learner(Telling(envs()), learning_rate=1e-3).learn(ROLLOUT), io.BytesIO(), Telling(envs())
    model.save_checkpoint(file)
    RecurrentPPO.resume(file, env, device="cpu")
    assert env.seen == N_STEPS


KEPT: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "generator of NumPy": (lambda: np.random.default_rng(0), lambda held: held.normal()),
    "old generator of NumPy": (lambda: np.random.RandomState(0), lambda held: held.normal()),
    "generator of Python": (lambda: random.Random(0), lambda held: held.random()),
    "generator of torch": (torch.Generator, lambda held: torch.randn(1, generator=held)),
    "list": (list, lambda held: held.append(1.0)),
    "deque of arrays": (lambda: deque([np.zeros(2)], 2), lambda held: held.append(np.ones(2))),
    "dict": (lambda: {"steps": 0}, lambda held: held.update(steps=held["steps"] + 1)),
    "tensor": (lambda: torch.zeros(2), lambda held: held.add_(1)),
    "statistics": (lambda: RunningMeanStd(shape=()), lambda held: held.update(np.ones(2))),
}


class Keeping(Counting):
    def __init__(self, venv: VecEnv, kind: str) -> None:
        super().__init__(venv)
        make, self.change = KEPT[kind]
        self.held = make()

    def step_wait(self) -> Any:
        self.change(self.held)
        return self.venv.step_wait()


@pytest.mark.parametrize("kind", KEPT)
def test_wrapper_that_keeps_anything_else_is_named_too(kind: str) -> None:
    model, file = learner(Keeping(envs(), kind), learning_rate=1e-3).learn(ROLLOUT), io.BytesIO()
    model.save_checkpoint(file)
    with pytest.warns(UserWarning, match="Keeping starts anew with other values of held than"):
        RecurrentPPO.resume(file, Keeping(envs(), kind), device="cpu")


def drop_more(model: RecurrentPPO) -> None:
    block: Any = model.policy.memory_actor.get_submodule("blocks.0")
    block.dropout.p = 0.5


def other_activation(model: RecurrentPPO) -> None:
    networks: Any = model.policy.mlp_extractor
    networks.policy_net[1] = torch.nn.ReLU()


def hook(model: RecurrentPPO) -> None:
    model.policy.action_net.register_forward_hook(lambda layer, given, output: 0.1 * output)


def hook_of_gradient(model: RecurrentPPO) -> None:
    weight: Any = model.policy.get_parameter("action_net.weight")
    weight.register_hook(lambda gradient: 0.1 * gradient)


@pytest.mark.parametrize("change", [drop_more, other_activation, hook, hook_of_gradient])
def test_layers_that_were_changed_after_the_agent_was_made_are_named(change: Callable[[RecurrentPPO], None]) -> None:
    model, file = agent(), io.BytesIO()
    change(model)
    model.save(file)
    with pytest.warns(UserWarning, match=r"layers were changed after the agent was made.*\['.*(net|dropout)"):
        RecurrentPPO.load(file)


class Growing(LossTerm):
    """Keeps a number that is neither a setting nor a weight."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, chunk: Any, computed: Any) -> Any:
        self.calls += 1
        return self.calls * computed.values**2

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def test_weights_of_losses_and_what_they_keep_are_those_of_the_time_of_saving(tmp_path: Path) -> None:
    register_loss("growing", Growing)
    losses: Any = {"growing": {"weight": 0.1}}
    whole = learner(envs(), learning_rate=1e-3, policy_kwargs={"extra_losses": losses})
    whole.policy.loss_terms.weights["growing"] = 0.01
    whole.learn(ROLLOUT)
    file = io.BytesIO()
    whole.save_checkpoint(file)
    whole.learn(ROLLOUT, reset_num_timesteps=False)
    resumed = RecurrentPPO.resume(file, envs(), device="cpu")
    assert resumed.policy.loss_terms.weights == {"growing": 0.01}
    assert_same_run(whole, resumed.learn(ROLLOUT, reset_num_timesteps=False))
    whole.policy.save(str(tmp_path / "policy.zip"))
    assert type(whole.policy).load(str(tmp_path / "policy.zip")).loss_terms.weights == {"growing": 0.01}


class Shifting(VecNormalize):
    """A normalisation of one's own, which tells its state itself."""

    shift = 0.0

    def get_state(self) -> float:
        return self.shift

    def set_state(self, state: float) -> None:
        self.shift = state


def test_state_that_a_kind_of_known_wrapper_tells_goes_before_what_is_known_of_it() -> None:
    env, other = Shifting(envs()), Shifting(envs())
    env.shift = 0.5
    model, file = learner(env, learning_rate=1e-3).learn(ROLLOUT), io.BytesIO()
    model.save_checkpoint(file)
    RecurrentPPO.resume(file, other, device="cpu")
    assert other.shift == 0.5


def test_normalizer_that_cannot_take_the_settings_is_refused() -> None:
    model, file = learner(VecNormalize(envs()), learning_rate=1e-3).learn(ROLLOUT), io.BytesIO()
    model.save_checkpoint(file)
    with pytest.raises(CheckpointError, match="the run normalised observations.*norm_obs=False"):
        RecurrentPPO.resume(file, VecNormalize(envs(), norm_obs=False), device="cpu")


def test_run_that_has_not_begun_is_saved_and_resumed() -> None:
    def env() -> VecEnv:
        return VecNormalize(envs())

    whole, file = learner(env(), learning_rate=1e-3), io.BytesIO()
    whole.save_checkpoint(file)
    whole.learn(ROLLOUT)
    with pytest.warns(UserWarning, match="new episodes"):
        parts = RecurrentPPO.resume(file, env(), device="cpu")
    parts.learn(ROLLOUT)
    assert parts.num_timesteps == whole.num_timesteps


def test_weights_that_were_tied_by_hand_are_not_loaded_as_two(tmp_path: Any) -> None:
    def tied(seed: int) -> RecurrentPPO:
        model = agent(seed=seed)
        actor, critic = model.policy.mlp_extractor.policy_net[0], model.policy.mlp_extractor.value_net[0]
        critic.weight = actor.weight
        model.policy.optimizer = torch.optim.Adam(model.policy.parameters())
        return model

    model = tied(0)
    model.save(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"policy_net\.0\.weight' and '.*value_net\.0\.weight' are one, and two"):
        RecurrentPPO.load(tmp_path / "model")
    other = tied(1)
    other.set_parameters(str(tmp_path / "model"))
    assert_same(model, other)
