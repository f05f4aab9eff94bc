"""The Python examples of the README and of the pages in docs/ run as they stand, with fewer steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from xlstm_rl.memory.core import _REGISTRY

ROOT = Path(__file__).parents[1]


def run_blocks(page: str) -> dict[str, Any]:
    """Run the Python blocks of a page one after the other and return what they define."""
    text = (ROOT / page).read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": page}
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(re.sub(r"learn\(\d+_000", "learn(256", block), namespace)
    return namespace


def test_readme_examples_run_one_after_the_other() -> None:
    assert run_blocks("README.md")["y"].shape == (8, 64)


@pytest.mark.parametrize("page", ["action_masks", "memory_inputs", "migration", "vector_environments"])
def test_pages_of_the_docs_run(page: str) -> None:
    assert run_blocks(f"docs/{page}.md")["model"].num_timesteps >= 256


def test_memory_of_the_docs_is_registered() -> None:
    core = run_blocks("docs/own_memory.md")["OneGate"]
    assert _REGISTRY.pop("one-gate") is core
