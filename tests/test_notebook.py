"""The notebook of the documentation: executed from the first cell to the last, with the outputs that are shown."""

import os
import sys

import pytest
from processes import ROOT

NOTEBOOK = ROOT / "docs/notebook.ipynb"


def outputs(cell):
    """Return the texts that a cell prints, and the number of its pictures."""
    text = "".join(output.get("text", "") for output in cell.outputs if output.get("name") == "stdout")
    return text.replace("\r\n", "\n"), sum("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.slow
def test_notebook_runs_and_shows_its_outputs(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin/madgen"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m madgen "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shown, notebook = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [pair for pair in zip(notebook.cells, shown.cells, strict=True) if pair[0].cell_type == "code"]
    assert [outputs(cell) for cell, _ in cells] == [outputs(expected) for _, expected in cells]
    assert sum(outputs(cell)[1] for cell, _ in cells) == 2
    assert "2 of 2 panoramas present: as planned" in "".join(outputs(cell)[0] for cell, _ in cells)
