"""What the module for RLlib says where there is no RLlib."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec

import pytest


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> ModuleSpec | None:
        return None if name == "ray" else find_spec(name)

    monkeypatch.setattr("importlib.util.find_spec", find)
    monkeypatch.delitem(sys.modules, "xlstm_rl.rllib", raising=False)
    with pytest.raises(ImportError, match=r"xlstm-rl\[rllib\]"):
        importlib.import_module("xlstm_rl.rllib")
