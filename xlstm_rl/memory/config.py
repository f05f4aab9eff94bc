"""Settings of memories: those of the xLSTM stack, and checks whose messages name the setting and what is allowed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from xlstm_rl.memory.core import block_letters


@dataclass(frozen=True)
class XLSTMConfig:
    """Shape and options of an xLSTM stack.

    The defaults are what is recommended where nothing is known of a task: the sLSTM below tracks and counts with memory
    mixing in one head, the mLSTM above it stores and recalls.

    Attributes:
        hidden_size: width of the residual stream and of the output; a multiple of the numbers of heads.
        blocks: the stack, spelled bottom to top: "m" an mLSTM block, "s" an sLSTM block ("mmms" is xLSTM[3:1]), "a"
            attention over a window, "d" a selective diagonal state space, and letters added by `register_block`.
        num_heads: heads of every block.
        slstm_num_heads: heads of sLSTM blocks, if different from `num_heads`. Memory mixing stays within a head, so one
            head tracks states best, while an mLSTM head is a memory of its own.
        input_projection: embed the input linearly into the residual stream; without it, `input_size` must equal
            `hidden_size`.
        proj_factor: inner width of mLSTM blocks over `hidden_size`.
        ffn_factor: inner width of the feed-forward network of sLSTM blocks over `hidden_size`; 0 leaves it out.
        round_to: inner widths are rounded up to a multiple of this. The reference code rounds to 64, which
            dominates small widths.
        qkv_block_size: block size of the block-diagonal q, k, v projections.
        conv_kernel: steps seen by the causal convolution before the gates, the current one included; 0 leaves it out.
        slstm_conv_kernel: the same for sLSTM blocks, if different from `conv_kernel`.
        forget_activation: "sigmoid" or "exp" forget gate.
        input_activation: "exp" (the paper) or "sigmoid" input gate of mLSTM blocks.
        gate_soft_cap: soft cap of the gate pre-activations of mLSTM blocks, for example 15 (Beck et al. 2025).
        init: "recall" starts every convolution as the current step alone and the queries of mLSTM blocks equal to their
            keys, so that reading by content works from the first update; "reference" starts both at random, as the
            reference does.
        mlstm_forget_bias: first and last of the forget biases, spread linearly over the heads.
        slstm_forget_bias: first and last of the forget biases, spread linearly over the units of a head; None takes
            the reference's power law from 5 down to -7.
        recurrent_std: standard deviation of the initial recurrent weights of sLSTM blocks, times 1/sqrt(head
            width); 0 starts without memory mixing, as the reference does.
        dropout: on the output of every block and feed-forward network, in training mode.
        bias: biases in the up and down projections.
        post_norm: layer norm after the last block.
        norm_eps: added to the variance in every norm.
        attention_window: earlier steps that attention blocks attend to.
        num_states: states per inner feature of state-space blocks, whose inner width and convolution are those of mLSTM
            blocks.

    Raises:
        TypeError: a field is of the wrong kind; the message names it.
        ValueError: a field has an impossible value; the message names it.
    """

    hidden_size: int = 64
    blocks: str = "sm"
    num_heads: int = 4
    slstm_num_heads: int | None = 1
    input_projection: bool = True
    proj_factor: float = 2.0
    ffn_factor: float = 0.0
    round_to: int = 8
    qkv_block_size: int = 4
    conv_kernel: int = 32
    slstm_conv_kernel: int | None = 0
    forget_activation: Literal["sigmoid", "exp"] = "sigmoid"
    input_activation: Literal["exp", "sigmoid"] = "exp"
    gate_soft_cap: float | None = None
    init: Literal["recall", "reference"] = "recall"
    mlstm_forget_bias: tuple[float, float] = (3.0, 6.0)
    slstm_forget_bias: tuple[float, float] | None = (1.0, 1.0)
    recurrent_std: float = 1.0
    dropout: float = 0.0
    bias: bool = False
    post_norm: bool = True
    norm_eps: float = 1e-5
    attention_window: int = 64
    num_states: int = 8

    @classmethod
    def paper(cls, **fields: Any) -> XLSTMConfig:
        """The settings of Beck et al. 2024, but for `fields`, and for widths that are rounded to 8 and not to 64."""
        settings = {
            "blocks": "ms",
            "slstm_num_heads": None,
            "ffn_factor": 4 / 3,
            "conv_kernel": 4,
            "slstm_conv_kernel": None,
            "init": "reference",
            "slstm_forget_bias": None,
            "recurrent_std": 0.0,
        }
        return cls(**{**settings, **fields})

    def __post_init__(self) -> None:
        self._check_blocks()
        for name in ("hidden_size", "num_heads", "round_to", "qkv_block_size", "attention_window", "num_states"):
            check_whole(name, getattr(self, name), 1)
        check_whole("conv_kernel", self.conv_kernel, 0)
        if self.slstm_conv_kernel is not None:
            check_whole("slstm_conv_kernel", self.slstm_conv_kernel, 0)
        if self.slstm_num_heads is not None:
            check_whole("slstm_num_heads", self.slstm_num_heads, 1)
        for name in ("num_heads", "slstm_num_heads"):
            heads = getattr(self, name)
            if heads is not None and self.hidden_size % heads:
                raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of {name}={heads}")
        for name in ("input_projection", "bias", "post_norm"):
            check_flag(name, getattr(self, name))
        for name in ("forget_activation", "input_activation"):
            check_word(name, getattr(self, name), ("sigmoid", "exp"))
        check_word("init", self.init, ("recall", "reference"))
        check_pair("mlstm_forget_bias", self.mlstm_forget_bias)
        if self.slstm_forget_bias is not None:
            check_pair("slstm_forget_bias", self.slstm_forget_bias)
        self._check_numbers()
        self._check_heads()

    def _check_blocks(self) -> None:
        known = ", ".join(map(repr, block_letters()))
        message = f"blocks={self.blocks!r} must be a word of {known}, such as 'ms'; add a letter with register_block"
        if not isinstance(self.blocks, str):
            raise TypeError(message)
        if not self.blocks or set(self.blocks) - set(block_letters()):
            raise ValueError(message)

    def _check_numbers(self) -> None:
        for name in ("proj_factor", "norm_eps"):
            check_number(name, getattr(self, name), above=0)
        for name in ("ffn_factor", "recurrent_std"):
            check_number(name, getattr(self, name), least=0)
        check_number("dropout", self.dropout, least=0, below=1)
        if self.gate_soft_cap is not None:
            check_number("gate_soft_cap", self.gate_soft_cap, above=0)

    def _check_heads(self) -> None:
        for kind, heads, width in (("m", self.num_heads, self.inner_size), ("s", self.slstm_heads, self.hidden_size)):
            if kind in self.blocks and heads == width:
                name = "slstm_num_heads" if kind == "s" and self.slstm_num_heads is not None else "num_heads"
                raise ValueError(
                    f"{name}={heads} leaves every head of a {kind!r} block one unit, of which its norm leaves nothing: "
                    "take fewer heads"
                )

    @property
    def slstm_heads(self) -> int:
        """Heads of sLSTM blocks."""
        return self.num_heads if self.slstm_num_heads is None else self.slstm_num_heads

    @property
    def slstm_conv(self) -> int:
        """Steps seen by the convolution of sLSTM blocks."""
        return self.conv_kernel if self.slstm_conv_kernel is None else self.slstm_conv_kernel

    @property
    def inner_size(self) -> int:
        """Width inside mLSTM blocks: a multiple of `round_to`, `num_heads` and `qkv_block_size`."""
        multiple = math.lcm(self.round_to, self.num_heads, self.qkv_block_size)
        return round_up(self.proj_factor * self.hidden_size, multiple)

    @property
    def ffn_size(self) -> int:
        """Width inside the feed-forward networks of sLSTM blocks; 0 when there are none."""
        return round_up(self.ffn_factor * self.hidden_size, self.round_to)


def check_fits(what: str, size: int) -> None:
    """Refuse what is larger than the memory of this machine.

    Args:
        what: settings and their values, for the message.
        size: bytes.

    Raises:
        ValueError: no such amount can be had here.
    """
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        # nothing tells it there; the system will
        return
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > there > 0:
        raise ValueError(f"{what} takes {size // 2**30:,} GiB, and this machine has {there // 2**30:,}; take less")


def check_whole(name: str, value: object, least: int) -> None:
    """Refuse what is no whole number of at least `least`.

    Raises:
        TypeError: it is of another kind; 64.0 and True are.
        ValueError: it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r} must be a whole number of at least {least}")
    if int(value) < least:
        raise ValueError(f"{name}={value} must be at least {least}")


def check_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
    """Refuse what is no finite number, or lies outside of the bounds.

    Args:
        name: of the setting.
        value: met.
        least: smallest allowed value, None for no such bound.
        above: largest value too small, None for no such bound.
        below: smallest value too large, None for no such bound.
        most: largest allowed value, None for no such bound.

    Raises:
        TypeError: it is no number.
        ValueError: it is infinite, NaN or out of bounds.
    """
    bounds = {"of at least": least, "greater than": above, "less than": below, "at most": most}
    allowed = ["a finite number", *(f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None)]
    message = f"{name}={value!r} must be {' '.join(allowed[:2])}{''.join(f' and {part}' for part in allowed[2:])}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(message)
    number = float(value)
    too_small = (least is not None and number < least) or (above is not None and number <= above)
    too_large = (below is not None and number >= below) or (most is not None and number > most)
    if not math.isfinite(number) or too_small or too_large:
        raise ValueError(message)


def check_pair(name: str, value: object) -> None:
    """Refuse what is no tuple of two finite numbers.

    Raises:
        TypeError: it is of another kind or length.
        ValueError: one of the numbers is infinite or NaN.
    """
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"{name}={value!r} must be a pair of finite numbers, first and last, such as (3.0, 6.0)")
    for index, item in enumerate(value):
        check_number(f"{name}[{index}]", item)


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither true nor false.

    Raises:
        TypeError: it is of another kind.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be true or false")


def check_word(name: str, value: object, allowed: Iterable[str]) -> None:
    """Refuse a word that is not among the allowed ones.

    Raises:
        TypeError: it is no word.
        ValueError: it is another one.
    """
    words = ", ".join(repr(word) for word in allowed)
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r} must be a word, one of {words}")
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {words}")


def round_up(value: float, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return math.ceil(value / multiple) * multiple
