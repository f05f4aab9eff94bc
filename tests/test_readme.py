"""The README's Python examples run as they stand, with fewer steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_readme_examples_run_one_after_the_other() -> None:
    assert len(BLOCKS) == 3
    namespace: dict[str, Any] = {}
    for block in BLOCKS:
        exec(re.sub(r"learn\(\d+_000", "learn(256", block), namespace)
    assert namespace["y"].shape == (8, 64)
