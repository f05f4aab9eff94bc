"""Import of weights from NX-AI's `xlstm` package (its v1 block stack), without needing that package."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from xlstm_rl.memory.xlstm import XLSTM

# Settings that no weight tells of, and under which a core computes what the reference does.
_AS_IN_REFERENCE = {
    "input_projection": False,
    "forget_activation": "sigmoid",
    "input_activation": "exp",
    "gate_soft_cap": None,
    "norm_eps": 1e-5,
}
_BLOCK_PREFIX = re.compile(r"^(.*?)blocks\.0\.xlstm_norm\.weight$")


def load_nxai_weights(core: XLSTM, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights of an NX-AI `xLSTMBlockStack` (v1 blocks, vanilla sLSTM backend) into an xLSTM core.

    The core must have the stack's shape: `hidden_size=embedding_dim`, the same `blocks` and `num_heads`,
    `round_to=64` (the reference rounds inner widths to 64), `ffn_factor` and `proj_factor` as in its configuration.
    It must have no input projection, which the reference has not; a layer of your own may stand before the core.

    Args:
        core: receives the weights, cast to its dtype.
        weights: `stack.state_dict()`; a prefix such as "xlstm_block_stack." (language models) is found by itself.

    Raises:
        ValueError: a weight is missing, left over, of another shape, or not finite, or the core computes something
            else than the stack; the message names it.
    """
    if set(core.config.blocks) - set("ms"):
        raise ValueError(f"blocks={core.config.blocks!r}: only stacks of 'm' and 's' have weights of NX-AI")
    others = [
        f"{name}={getattr(core.config, name)!r}, not {value!r}"
        for name, value in _AS_IN_REFERENCE.items()
        if getattr(core.config, name) != value
    ]
    if others:
        raise ValueError(
            f"with these weights the core would compute something else than the stack of NX-AI: {'; '.join(others)}"
        )
    prefixes = [match.group(1) for match in map(_BLOCK_PREFIX.match, weights) if match]
    if len(prefixes) != 1:
        raise ValueError("no key ends in 'blocks.0.xlstm_norm.weight': this is no state_dict of an NX-AI v1 stack")
    prefix = prefixes[0]
    given = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
    given = {key: value for key, value in given.items() if key.startswith(("blocks.", "post_blocks_norm."))}
    mapped: dict[str, Tensor] = {}
    for index, kind in enumerate(core.config.blocks):
        source = _Source(given, f"blocks.{index}.")
        block = _mlstm_block(source, core) if kind == "m" else _slstm_block(source, core)
        mapped |= {f"blocks.{index}.{name}": value for name, value in block.items()}
    if core.config.post_norm:
        mapped["post_norm.weight"] = 1 + _Source(given, "post_blocks_norm.").pop("weight")
    if given:
        raise ValueError(f"weights left over: {sorted(given)}; the core {core.config} has no place for them")
    _copy(core, mapped)


class _Source:
    """Weights below one prefix; taking one removes it."""

    def __init__(self, weights: dict[str, Tensor], prefix: str) -> None:
        self.weights, self.prefix = weights, prefix

    def pop(self, name: str) -> Tensor:
        try:
            return self.weights.pop(self.prefix + name)
        except KeyError:
            raise ValueError(f"weight {self.prefix + name!r} is missing; does `blocks` spell the same stack?") from None

    def pop_if_there(self, name: str) -> Tensor | None:
        return self.weights.pop(self.prefix + name, None)


def _mlstm_block(source: _Source, core: XLSTM) -> dict[str, Tensor]:
    cell = "xlstm.mlstm_cell."
    mapped = {
        "norm.weight": 1 + source.pop("xlstm_norm.weight"),
        "up.weight": source.pop("xlstm.proj_up.weight"),
        "query_key.weight": torch.cat([source.pop("xlstm.q_proj.weight"), source.pop("xlstm.k_proj.weight")], dim=1),
        "value.weight": source.pop("xlstm.v_proj.weight"),
        "gates.weight": torch.cat([source.pop(cell + "igate.weight"), source.pop(cell + "fgate.weight")]),
        "gates.bias": torch.cat([source.pop(cell + "igate.bias"), source.pop(cell + "fgate.bias")]),
        "head_norm.weight": 1 + source.pop(cell + "outnorm.weight"),
        "skip": source.pop("xlstm.learnable_skip"),
        "down.weight": source.pop("xlstm.proj_down.weight"),
    }
    if core.config.bias:
        mapped["up.bias"] = source.pop("xlstm.proj_up.bias")
        mapped["down.bias"] = source.pop("xlstm.proj_down.bias")
        query, key, value = (source.pop(f"xlstm.{name}_proj.bias") for name in "qkv")
        blocks = core.config.inner_size // core.config.qkv_block_size
        mapped["query_key.bias"] = torch.cat([query.view(blocks, -1), key.view(blocks, -1)], dim=1)
        mapped["value.bias"] = value.view(blocks, -1)
    return mapped | _conv(source)


def _slstm_block(source: _Source, core: XLSTM) -> dict[str, Tensor]:
    kernel = source.pop("xlstm.slstm_cell._recurrent_kernel_")
    heads, rows, head_width = kernel.shape
    # vanilla backend: [head, gate * out, in]
    if rows != 4 * head_width:
        raise ValueError(
            f"weight {source.prefix + 'xlstm.slstm_cell._recurrent_kernel_'!r} has shape {tuple(kernel.shape)}, not "
            "[heads, 4 * width, width]: it is not of the vanilla backend; build the stack with backend='vanilla'"
        )
    recurrent = kernel.reshape(heads, 4, head_width, head_width).transpose(0, 1)
    mapped = {
        "norm.weight": 1 + source.pop("xlstm_norm.weight"),
        # the module called fgate feeds the input slot and igate the forget slot
        "input_forget.weight": torch.cat([source.pop("xlstm.fgate.weight"), source.pop("xlstm.igate.weight")], dim=1),
        "cell_output.weight": torch.cat([source.pop("xlstm.zgate.weight"), source.pop("xlstm.ogate.weight")], dim=1),
        "gate_bias": source.pop("xlstm.slstm_cell._bias_").reshape(4, heads, head_width),
        "recurrent": recurrent,
        "head_norm.weight": 1 + source.pop("xlstm.group_norm.weight"),
    }
    if core.config.ffn_size:
        mapped["ffn_norm.weight"] = 1 + source.pop("ffn_norm.weight")
        for name in ("up", "down"):
            mapped[f"ffn.{name}.weight"] = source.pop(f"ffn.proj_{name}.weight")
            if core.config.bias:
                mapped[f"ffn.{name}.bias"] = source.pop(f"ffn.proj_{name}.bias")
    return mapped | _conv(source)


def _conv(source: _Source) -> dict[str, Tensor]:
    weight = source.pop_if_there("xlstm.conv1d.conv.weight")
    if weight is None:
        return {}
    return {"conv.weight": weight.squeeze(1), "conv.bias": source.pop("xlstm.conv1d.conv.bias")}


@torch.no_grad()
def _copy(core: XLSTM, mapped: dict[str, Tensor]) -> None:
    own = {name: value for name, value in core.named_parameters() if not name.startswith("input_projection")}
    if own.keys() != mapped.keys():
        raise ValueError(
            f"the core {core.config} and the weights differ in {sorted(own.keys() ^ mapped.keys())}; "
            "check blocks, conv_kernel, ffn_factor, bias and post_norm"
        )
    wrong = [
        f"{name}: {list(mapped[name].shape)}, not {list(value.shape)}"
        for name, value in own.items()
        if mapped[name].shape != value.shape
    ]
    if wrong:
        raise ValueError(f"weights of another shape (check hidden_size, num_heads, proj_factor, round_to): {wrong}")
    # as they will be used: a number of double precision can be too large for single precision
    cast = {name: mapped[name].to(value.dtype) for name, value in own.items()}
    infinite = [name for name, value in cast.items() if not bool(value.isfinite().all())]
    if infinite:
        raise ValueError(f"weights that are not finite in {next(iter(own.values())).dtype}: {infinite}")
    for name, value in own.items():
        value.copy_(cast[name])
