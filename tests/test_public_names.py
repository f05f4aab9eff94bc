"""What `xlstm_rl` offers without deep imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

import xlstm_rl


@pytest.mark.parametrize("name", xlstm_rl.__all__)
def test_public_name_is_there_and_listed(name: str) -> None:
    assert getattr(xlstm_rl, name) is not None
    assert name in dir(xlstm_rl)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="xlstm_rl.*'nothing'"):
        _ = xlstm_rl.nothing


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("agents.subprocesses", "GuardedSubprocVecEnv"),
        ("callbacks", "PeriodicCheckpoint"),
        ("finished", "open_run"),
        ("training", "train"),
        ("training", "resume"),
    ],
)
def test_moved_module_is_found_where_it_was_with_a_warning(name: str, attribute: str) -> None:
    sys.modules.pop(f"xlstm_rl.{name}", None)
    with pytest.warns(DeprecationWarning, match=rf"xlstm_rl\.{name} is now xlstm_rl\."):
        exec(f"from xlstm_rl.{name} import {attribute}")


def test_unknown_module_is_not_found() -> None:
    done = subprocess.run([sys.executable, "-c", "import xlstm_rl.nothing"], capture_output=True, text=True)
    assert "No module named 'xlstm_rl.nothing'" in done.stderr
