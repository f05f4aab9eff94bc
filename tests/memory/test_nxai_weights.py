"""Oracle: with imported weights our stacks compute what NX-AI's `xlstm` computes step by step."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from xlstm_rl.memory import XLSTM, XLSTMConfig, load_nxai_weights

xlstm = pytest.importorskip("xlstm", reason="the oracle is installed by `make test`, without its dependencies")


def nxai_stack(blocks: str, width: int, heads: int, bias: bool, conv: int, seed: int) -> Any:
    from xlstm.blocks.mlstm.block import mLSTMBlockConfig
    from xlstm.blocks.mlstm.layer import mLSTMLayerConfig
    from xlstm.blocks.slstm.block import sLSTMBlockConfig
    from xlstm.blocks.slstm.layer import sLSTMLayerConfig
    from xlstm.components.feedforward import FeedForwardConfig
    from xlstm.xlstm_block_stack import xLSTMBlockStack, xLSTMBlockStackConfig

    config = xLSTMBlockStackConfig(
        mlstm_block=mLSTMBlockConfig(mlstm=mLSTMLayerConfig(num_heads=heads, conv1d_kernel_size=4)),
        slstm_block=sLSTMBlockConfig(
            slstm=sLSTMLayerConfig(num_heads=heads, conv1d_kernel_size=conv, backend="vanilla", dtype="float32"),
            feedforward=FeedForwardConfig(proj_factor=4 / 3, bias=bias),
        ),
        num_blocks=len(blocks),
        embedding_dim=width,
        context_length=64,
        bias=bias,
        slstm_at=[index for index, kind in enumerate(blocks) if kind == "s"],
    )
    stack = xLSTMBlockStack(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return stack


def our_core(blocks: str, width: int, heads: int, bias: bool = False) -> XLSTM:
    config = XLSTMConfig.paper(
        hidden_size=width, blocks=blocks, num_heads=heads, round_to=64, input_projection=False, bias=bias
    )
    return XLSTM(width, config).double().eval()


@pytest.mark.parametrize(
    ("blocks", "width", "heads", "bias"),
    [("m", 32, 4, False), ("s", 32, 4, False), ("ms", 48, 2, False), ("smms", 32, 4, False), ("msm", 64, 4, True)],
)
def test_imported_stack_equals_the_reference_step_by_step(blocks: str, width: int, heads: int, bias: bool) -> None:
    reference = nxai_stack(blocks, width, heads, bias, conv=4, seed=1)
    core = our_core(blocks, width, heads, bias)
    load_nxai_weights(core, reference.state_dict())
    x = torch.randn(3, 40, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    state, expected = None, []
    with torch.no_grad():
        for t in range(x.shape[1]):
            y, state = reference.step(x[:, t : t + 1].clone(), state)
            expected.append(y.clone())
        actual, _ = core(x, core.initial_state(3))
    difference = (actual - torch.cat(expected, 1)).abs().max().item()
    # the reference adds 1e-6 to the mLSTM normaliser, which the paper does not have
    assert difference < (1e-12 if "m" not in blocks else 1e-4)


@pytest.mark.parametrize("blocks", ["m", "ms", "smms"])
def test_imported_stack_equals_the_reference_exactly_without_its_epsilon(
    blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xlstm.blocks.mlstm import backends, cell

    original = backends.recurrent_step_stabilized_simple
    step = lambda *args, **kwargs: original(*args, **(kwargs | {"eps": 0.0}))  # noqa: E731
    monkeypatch.setattr(cell, "recurrent_step_stabilized_simple", step)
    reference = nxai_stack(blocks, 32, 4, False, conv=4, seed=3)
    core = our_core(blocks, 32, 4)
    load_nxai_weights(core, reference.state_dict())
    x = torch.randn(2, 20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    state, expected = None, []
    with torch.no_grad():
        for t in range(x.shape[1]):
            y, state = reference.step(x[:, t : t + 1].clone(), state)
            expected.append(y.clone())
        actual, _ = core(x, core.initial_state(2))
    difference = (actual - torch.cat(expected, 1)).abs().max().item()
    assert difference < 1e-11


def test_language_model_prefix_is_found() -> None:
    weights = {f"xlstm_block_stack.{k}": v for k, v in nxai_stack("ms", 32, 4, False, 4, 5).state_dict().items()}
    weights["token_embedding.weight"] = torch.zeros(3, 32)
    core = our_core("ms", 32, 4)
    before = core.get_parameter("blocks.0.up.weight").clone()
    load_nxai_weights(core, weights)
    assert not torch.equal(core.get_parameter("blocks.0.up.weight"), before)


@pytest.mark.parametrize(
    ("blocks", "width", "message"),
    [("mm", 32, "is missing"), ("m", 32, "left over"), ("ms", 64, "another shape")],
)
def test_weights_of_another_stack_are_refused(blocks: str, width: int, message: str) -> None:
    weights = nxai_stack("ms", 32, 4, False, conv=4, seed=6).state_dict()
    with pytest.raises(ValueError, match=message):
        load_nxai_weights(our_core(blocks, width, 4), weights)


def test_weights_of_the_cuda_backend_are_refused_by_name() -> None:
    weights = nxai_stack("s", 32, 4, False, conv=4, seed=6).state_dict()
    name = "blocks.0.xlstm.slstm_cell._recurrent_kernel_"
    weights[name] = weights[name].transpose(1, 2)  # [heads, in, gate * out]
    with pytest.raises(ValueError, match=f"{name}.*backend='vanilla'"):
        load_nxai_weights(our_core("s", 32, 4), weights)


def test_weights_that_are_no_stack_are_refused() -> None:
    with pytest.raises(ValueError, match="no state_dict of an NX-AI"):
        load_nxai_weights(our_core("m", 32, 4), {"weight": torch.zeros(1)})


def test_weights_that_single_precision_cannot_hold_are_refused_by_name() -> None:
    weights = nxai_stack("m", 32, 4, False, conv=4, seed=6).state_dict()
    weights["blocks.0.xlstm.proj_up.weight"][0, 0] = 1e300
    core = our_core("m", 32, 4).float()
    before = core.get_parameter("blocks.0.skip").clone()
    with pytest.raises(ValueError, match=r"not finite in torch.float32: \['blocks.0.up.weight'\]"):
        load_nxai_weights(core, weights)
    assert torch.equal(core.get_parameter("blocks.0.skip"), before)


def test_stack_of_other_letters_has_no_such_weights() -> None:
    weights = nxai_stack("ms", 32, 4, False, conv=4, seed=6).state_dict()
    with pytest.raises(ValueError, match="blocks='ma': only stacks of 'm' and 's' have weights of NX-AI"):
        load_nxai_weights(our_core("ma", 32, 4), weights)


@pytest.mark.parametrize(
    "changed",
    [
        {"input_projection": True},
        {"forget_activation": "exp"},
        {"input_activation": "sigmoid"},
        {"gate_soft_cap": 15.0},
        {"norm_eps": 1e-3},
    ],
)
def test_core_that_would_compute_something_else_is_refused(changed: dict[str, Any]) -> None:
    config = dataclasses.replace(our_core("ms", 32, 4).config, **changed)
    weights = nxai_stack("ms", 32, 4, False, conv=4, seed=1).state_dict()
    core = XLSTM(32, config)
    before = [value.clone() for value in core.parameters()]
    (name,) = changed
    with pytest.raises(ValueError, match=f"would compute something else .*{name}="):
        load_nxai_weights(core, weights)
    assert all(map(torch.equal, before, core.parameters()))


def test_page_ends_in_equal_outputs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "nxai_weights.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "docs/nxai_weights.md"}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, namespace)
    assert namespace["difference"] < 1e-5
    assert namespace["model"].num_timesteps >= 256
