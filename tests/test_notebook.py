"""The notebook runs from its first cell to its last, and its agent remembers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_agent.ipynb"


@pytest.mark.slow
def test_agent_of_the_notebook_delivers(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # in a fresh kernel; an exception in a cell is raised here
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    said = "".join(output.get("text", "") for output in outputs)
    with_memory, without = map(float, re.findall(r"with memory (\S+), without (\S+)", said)[0])
    shares = [float(share) for share in re.findall(r"(\S+) of the parcels arrive", said)]
    # of a longer street, and as played by onnxruntime
    assert with_memory > 0.95 and without < 0.4 and min(shares[-2:]) > 0.9


def test_cells_were_run_in_order_when_the_notebook_was_saved() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
