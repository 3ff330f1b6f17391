"""The notebook of examples/ runs from top to bottom against a tiny export. Needs nbclient and ipykernel (.tools)."""

import os
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="run with PYTHONPATH=.tools")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples/quickstart.ipynb"


def test_the_notebook_is_committed_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs") and not cell.get("execution_count"), cell.source[:60]


def test_the_notebook_runs_from_top_to_bottom_in_a_minute_of_a_core(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEOTOKEN_MODEL", str(tiny / "export"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    last = nbformat.v4.new_code_cell("import time; print(time.process_time())")
    notebook.cells.append(last)
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    assert "50 % within" in text and "the loop went round" in text and "Percent" in text, text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert float(last.outputs[0]["text"]) < 60  # seconds of a core, however busy the machine is
