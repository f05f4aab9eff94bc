"""Settings of memory cores of the wrong kind or out of bounds are refused by name."""

import dataclasses
import math
from typing import Any

import pytest

from xlstm_rl.memory import XLSTMConfig, make_memory

FIELDS = [f.name for f in dataclasses.fields(XLSTMConfig)]
NUMBERS = [
    *("proj_factor", "ffn_factor", "gate_soft_cap", "recurrent_std", "dropout", "norm_eps"),
    *("hidden_size", "num_heads", "slstm_num_heads", "round_to", "qkv_block_size", "conv_kernel", "slstm_conv_kernel"),
]


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_refuses_another_kind(field: str) -> None:
    fields: dict[str, Any] = {field: {"odd": 1}}
    with pytest.raises(TypeError, match=rf"^{field}=\{{'odd': 1\}} must be "):
        XLSTMConfig(**fields)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", NUMBERS)
def test_every_number_must_be_finite(field: str, value: float) -> None:
    fields: dict[str, Any] = {field: value}
    with pytest.raises((TypeError, ValueError), match=rf"^{field}={value} must be "):
        XLSTMConfig(**fields)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("hidden_size", "abc", "a whole number of at least 1"),
        ("hidden_size", 64.0, "a whole number of at least 1"),
        ("num_heads", True, "a whole number of at least 1"),
        ("slstm_num_heads", 2.0, "a whole number of at least 1"),
        ("conv_kernel", None, "a whole number of at least 0"),
        ("norm_eps", True, "a finite number greater than 0"),
        ("bias", "maybe", "true or false"),
        ("post_norm", 1, "true or false"),
        ("mlstm_forget_bias", 3, "a pair of finite numbers"),
        ("mlstm_forget_bias", (1.0, 2.0, 3.0), "a pair of finite numbers"),
        ("mlstm_forget_bias", (1.0, "2"), "a finite number"),
        ("forget_activation", None, "one of 'sigmoid', 'exp'"),
    ],
)
def test_wrong_kind_is_named_with_what_is_allowed(field: str, value: object, allowed: str) -> None:
    fields: dict[str, Any] = {field: value}
    with pytest.raises(TypeError, match=rf"^{field}.*must be .*{allowed}"):
        XLSTMConfig(**fields)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("norm_eps", -1, "greater than 0"),
        ("norm_eps", 0.0, "greater than 0"),
        ("ffn_factor", -0.5, "of at least 0"),
        ("dropout", 1, "of at least 0 and less than 1"),
        ("mlstm_forget_bias", (math.nan, 1.0), "a finite number"),
        ("slstm_forget_bias", (1.0, math.inf), "a finite number"),
    ],
)
def test_impossible_number_is_named_with_what_is_allowed(field: str, value: object, allowed: str) -> None:
    fields: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=rf"^{field}.*must be .*{allowed}"):
        XLSTMConfig(**fields)


@pytest.mark.parametrize("memory", ["lstm", "gru", "none"])
@pytest.mark.parametrize("value", ["wide", 8.0, True, None])
def test_width_of_a_baseline_must_be_a_whole_number(memory: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"^hidden_size={value!r} must be a whole number"):
        make_memory(memory, 3, hidden_size=value)


@pytest.mark.parametrize(
    ("fields", "error"),
    [({"num_layers": 1.5}, TypeError), ({"bias": 1}, TypeError), ({"dropout": math.nan}, ValueError)],
    ids=str,
)
@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_wrong_setting_of_a_recurrent_baseline_is_named(
    memory: str, fields: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"^{next(iter(fields))}="):
        make_memory(memory, 3, **fields)
