"""Values described as JSON come back equal."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from xlstm_rl.agents.checkpoint import DescriptionError, describe, rebuild

SPACES: dict[str, spaces.Space[Any]] = {
    "unbounded": spaces.Box(-np.inf, np.inf, (2, 3)),
    "bounded on one side": spaces.Box(0, np.inf, (2,), np.float64),
    "bounds per element": spaces.Box(np.array([-1, -np.inf], np.float32), np.array([0.1, 7], np.float32)),
    "integers": spaces.Box(np.array([0, 3], np.int16), np.array([5, 9], np.int16), dtype=np.int16),
    "scalar": spaces.Box(-1, 1, ()),
    "discrete from 5": spaces.Discrete(4, start=5),
    "multi-discrete": spaces.MultiDiscrete(np.array([[3, 2], [4, 5]]), start=np.array([[1, 0], [0, 2]])),
    "multi-binary matrix": spaces.MultiBinary([2, 3]),
    "ordered dict": spaces.Dict([("z", spaces.Discrete(2)), ("a", spaces.Box(0, 1, (1,)))]),
    "nested dict": spaces.Dict({"inner": spaces.Dict({"x": spaces.MultiBinary(2)})}),
}


@pytest.mark.parametrize("name", SPACES)
def test_space_is_rebuilt(name: str) -> None:
    space = SPACES[name]
    rebuilt = rebuild(json.loads(json.dumps(describe(space, "space", {}), allow_nan=False)), "space", {})
    assert rebuilt == space
    assert rebuilt.dtype == space.dtype
    if isinstance(space, spaces.Dict):
        assert list(rebuilt) == list(space)


def test_unsupported_space_is_named() -> None:
    with pytest.raises(DescriptionError, match="Text"):
        describe(spaces.Text(3), "space", {})


def test_numpy_numbers_become_numbers() -> None:
    assert describe(np.float64(2.5), "", {}) == 2.5


def test_tensors_that_share_memory_are_kept_once() -> None:
    tensors: dict[str, torch.Tensor] = {}
    weight = torch.ones(2)
    described = describe({"a": weight, "b": weight, "c": torch.ones(2)}, "", tensors)
    assert list(tensors) == ["a", "c"]
    assert rebuild(described, "", tensors)["b"] is tensors["a"]


def test_values_are_rebuilt() -> None:
    value = {
        "a": (1, [2.5, float("inf")], None),
        "b": {3: "x", (4, 5): True},
        "c": {"$kind": "odd"},
        "d": np.float64(2),
    }
    assert rebuild(json.loads(json.dumps(describe(value, "", {}), allow_nan=False)), "", {}) == value
