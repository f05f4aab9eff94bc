"""Making memories by name, and refusing what cannot be made."""

from typing import Any

import numpy as np
import pytest
import torch

from xlstm_rl.memory import MemoryCore, Memoryless, XLSTMConfig, make_memory, memory_names, register_memory


def test_built_in_memories_are_known() -> None:
    assert {"xlstm", "lstm", "gru", "transformer", "ssm", "rwkv", "frames", "none"} <= set(memory_names())


def test_registered_core_is_made_by_name() -> None:
    register_memory("my-core", Memoryless)
    register_memory("my-core", Memoryless)
    assert isinstance(make_memory("my-core", 3, hidden_size=4), Memoryless)


def test_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'xlstm' is already registered"):
        register_memory("xlstm", Memoryless)


def test_definition_that_is_run_again_takes_the_place_of_the_one_before() -> None:
    source = """
class Mine(Memoryless):
    pass
register_memory("run-again", Mine)
"""
    for _ in range(2):
        namespace: dict[str, Any] = {"Memoryless": Memoryless, "register_memory": register_memory, "__name__": "cell"}
        exec(source, namespace)
    assert type(make_memory("run-again", 3, hidden_size=8)) is namespace["Mine"]


def test_what_cannot_be_called_is_no_factory() -> None:
    with pytest.raises(TypeError, match="factory=3 must be callable"):
        register_memory("three", 3)  # type: ignore[arg-type]


def test_odd_name_is_refused() -> None:
    with pytest.raises(ValueError, match="must be made of letters"):
        register_memory("my core", Memoryless)


def test_unknown_memory_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown memory 'mamba'.*'gru', .*'lstm'"):
        make_memory("mamba", 3)


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("xlstm", {"block": "m"}, r"no setting \['block'\]; known are \['defaults', 'hidden_size', 'blocks', "),
        (
            "lstm",
            {"hidden": 8},
            r"'lstm' .*'hidden'; its settings are \['hidden_size', 'num_layers', 'bias', 'dropout', 'forget_bias'\]",
        ),
    ],
)
def test_unknown_setting_is_told_with_the_known_ones(name: str, settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(TypeError, match=complaint):
        make_memory(name, 3, **settings)


def test_core_without_a_width_cannot_match_parameters() -> None:
    register_memory("no-width", NoWidth)
    assert make_memory("no-width", 3, scale=2.0).output_size == 3
    with pytest.raises(TypeError, match=r"'no-width' .*'hidden_size'; its settings are \['scale'\]"):
        make_memory("no-width", 3, match_parameters=100)


class NoWidth(Memoryless):
    def __init__(self, input_size: int, scale: float = 1.0) -> None:
        super().__init__(input_size, hidden_size=input_size)
        self.scale = scale


@pytest.mark.parametrize(
    "fields",
    [
        {"blocks": "mz"},
        {"blocks": ""},
        {"hidden_size": 30, "num_heads": 4},
        {"num_heads": 0},
        {"slstm_num_heads": 3},
        {"slstm_num_heads": 0},
        {"num_heads": 64, "blocks": "s", "slstm_num_heads": None},
        {"num_heads": 64, "blocks": "m", "proj_factor": 1.0},
        {"slstm_num_heads": 64},
        {"proj_factor": 0.0},
        {"conv_kernel": -1},
        {"slstm_conv_kernel": -1},
        {"gate_soft_cap": 0.0},
        {"dropout": 1.0},
        {"forget_activation": "tanh"},
        {"input_activation": "relu"},
        {"init": "orthogonal"},
    ],
    ids=str,
)
def test_impossible_setting_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        XLSTMConfig(**fields)


def test_input_of_another_width_needs_the_input_projection() -> None:
    with pytest.raises(ValueError, match="input_size=3 must equal hidden_size=64"):
        make_memory("xlstm", 3, input_projection=False)


def test_inner_widths_are_rounded_up_to_what_fits() -> None:
    assert XLSTMConfig.paper(hidden_size=64).ffn_size == 88
    assert XLSTMConfig.paper(hidden_size=64, round_to=64).ffn_size == 128
    assert XLSTMConfig(hidden_size=60, num_heads=3).inner_size == 120


def test_slstm_blocks_take_the_heads_of_the_stack_or_their_own() -> None:
    def shape(**fields: int | None) -> list[int]:
        core = make_memory("xlstm", 3, hidden_size=64, num_heads=4, blocks="ms", **fields)
        return list(core.get_parameter("blocks.1.recurrent").shape)

    assert shape(slstm_num_heads=None) == [4, 4, 16, 16]
    assert shape(slstm_num_heads=1) == [4, 1, 64, 64]


def test_recurrent_weights_start_at_zero_or_not() -> None:
    def recurrent(std: float) -> float:
        core = make_memory("xlstm", 3, hidden_size=256, num_heads=4, blocks="s", slstm_num_heads=4, recurrent_std=std)
        return float(core.get_parameter("blocks.0.recurrent").detach().std())

    assert recurrent(0.0) == 0.0
    assert recurrent(1.0) == pytest.approx(1 / 8, rel=0.05)


def test_forget_biases_start_as_configured() -> None:
    core = make_memory("xlstm", 3, blocks="ms", slstm_forget_bias=[1.0, 2.0])
    mlstm = core.get_parameter("blocks.0.gates.bias")[4:]
    assert mlstm.tolist() == pytest.approx([3.0, 4.0, 5.0, 6.0])
    slstm = core.get_parameter("blocks.1.gate_bias")[1, 0]
    assert (slstm[0].item(), slstm[-1].item()) == pytest.approx((1.0, 2.0))
    power_law = make_memory("xlstm", 3, blocks="s", slstm_forget_bias=None).get_parameter("blocks.0.gate_bias")[1, 0]
    assert (power_law[0].item(), power_law[-1].item()) == pytest.approx((5.0, -7.0))


def test_settings_start_from_the_recommended_ones_or_from_those_of_the_paper() -> None:
    recommended: Any = make_memory("xlstm", 3)
    paper: Any = make_memory("xlstm", 3, defaults="paper", hidden_size=32)
    assert recommended.config == XLSTMConfig()
    assert paper.config == XLSTMConfig.paper(hidden_size=32)
    assert (recommended.config.blocks, paper.config.blocks) == ("sm", "ms")
    with pytest.raises(ValueError, match="defaults='reference' must be one of 'recommended', 'paper'"):
        make_memory("xlstm", 3, defaults="reference")


def test_mlstm_starts_by_reading_what_shows_again() -> None:
    """Untrained queries equal their keys and come from the current step alone, unless as the reference."""

    def query_key(init: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        core = make_memory("xlstm", 3, blocks="m", conv_kernel=4, init=init)
        query, key = core.get_parameter("blocks.0.query_key.weight").chunk(2, dim=1)
        return query, key, core.get_parameter("blocks.0.conv.weight")

    query, key, taps = query_key("recall")
    assert torch.equal(query, key)
    assert query.std().item() == pytest.approx(0.5, rel=0.1)  # blocks of 4 features keep their scale
    assert taps[:, -1].eq(1).all()
    assert taps[:, :-1].eq(0).all()
    query, key, taps = query_key("reference")
    assert not torch.equal(query, key)
    assert taps[:, :-1].ne(0).all()


def test_dropout_acts_in_training_mode_only() -> None:
    core = make_memory("xlstm", 3, blocks="ms", dropout=0.5)
    x = torch.ones(1, 4, 3)
    state = core.initial_state(1)
    core.train()
    assert not torch.equal(core(x, state)[0], core(x, state)[0])
    core.eval()
    assert torch.equal(core(x, state)[0], core(x, state)[0])


@pytest.mark.parametrize("target", [3_000, 40_000])
@pytest.mark.parametrize("name", ["xlstm", "lstm", "gru", "transformer", "ssm", "rwkv", "frames", "none"])
def test_size_is_chosen_to_match_parameters(name: str, target: int) -> None:
    def count(core: MemoryCore) -> int:
        return sum(parameter.numel() for parameter in core.parameters())

    core = make_memory(name, 6, match_parameters=target)
    size = core.output_size
    for other in (size - 4, size + 4):
        neighbour = make_memory(name, 6, hidden_size=other)
        assert abs(count(core) - target) <= abs(count(neighbour) - target)
    assert make_memory(name, 6, hidden_size=size).state_size == core.state_size


@pytest.mark.parametrize(("name", "heads"), [("xlstm", 3), ("xlstm", 16), ("transformer", 5), ("transformer", 12)])
def test_size_is_a_multiple_of_any_number_of_heads(name: str, heads: int) -> None:
    core = make_memory(name, 6, match_parameters=200_000, num_heads=heads)
    assert core.output_size % heads == 0
    count = sum(parameter.numel() for parameter in core.parameters())
    assert count == pytest.approx(200_000, rel=0.25)


@pytest.mark.parametrize("name", ["xlstm", "lstm", "gru", "transformer", "ssm", "rwkv", "frames", "none"])
def test_input_size_may_be_an_integer_of_numpy(name: str) -> None:
    # as Stable-Baselines3 gives it for MultiDiscrete observations
    assert make_memory(name, np.int64(5)).input_size == 5


def test_matching_refuses_a_size_of_its_own_and_too_few_parameters() -> None:
    with pytest.raises(ValueError, match="leave out hidden_size=8"):
        make_memory("lstm", 3, match_parameters=1000, hidden_size=8)
    with pytest.raises(ValueError, match="match_parameters=10 is less than the smallest"):
        make_memory("lstm", 3, match_parameters=10)


class OfOneSize(Memoryless):
    def __init__(self, input_size: int, hidden_size: int = 8) -> None:
        super().__init__(input_size, hidden_size=8)


def test_memory_that_does_not_grow_cannot_match_parameters() -> None:
    register_memory("of-one-size", OfOneSize)
    with pytest.raises(ValueError, match="match_parameters=1000 cannot be met"):
        make_memory("of-one-size", 3, match_parameters=1000)
