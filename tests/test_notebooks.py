"""The notebooks run from top to bottom, and what is committed of them is what a run leaves, and nothing of a machine.

python tests/test_notebooks.py [NAME ...]     executes them, all or some, and writes what they show into their files
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(name: str, folder: Path) -> nbformat.NotebookNode:
    """The notebook after a run in an empty folder, on one thread, by this interpreter: no kernel need be registered.

    Raises nbclient's CellExecutionError for a cell that raises.
    """
    kernel = AsyncKernelManager(
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), connection_file=str(folder / "kernel.json")
    )
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}  # pictures go inline
    environment |= {"OMP_NUM_THREADS": "1", "IPYTHONDIR": str(folder / "ipython")}
    environment["PYTHONWARNINGS"] = (
        "ignore:`torch.jit.script` is deprecated:FutureWarning"  # torch's, see pyproject.toml
    )
    notebook = read(name)
    client = NotebookClient(notebook, km=kernel, timeout=300, record_timing=False, coalesce_streams=True)
    client.execute(cwd=str(folder), env=environment, cleanup_kc=True)
    notebook.metadata.language_info = {"name": "python"}  # without the version
    return notebook


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def errors(notebook: nbformat.NotebookNode) -> list[str]:
    """What was written to stderr: a warning, in most cases."""
    return [output.text for output in outputs(notebook) if output.get("name") == "stderr"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, tmp_path):
    """Without an error, a warning, or a picture less than the file shows."""
    notebook = execute(name, tmp_path)
    assert errors(notebook) == []
    assert pictures(notebook) == pictures(read(name)) >= 2


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_committed_is_clean(name):
    """Executed once, in order; small; no path, version or time of the machine that it ran on."""
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    notebook = read(name)
    assert len(text) < 300_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert errors(notebook) == []
    assert [cell.metadata for cell in notebook.cells if cell.metadata] == []
    assert notebook.metadata.language_info == {"name": "python"}
    shown = re.sub(r'"image/png": "[^"]*"', "", text)
    assert re.findall(r"(?:/(?:home|root|tmp|opt|usr|Users|work)/|[A-Z]:\\\\)\S*", shown) == []


def test_the_list_of_notebooks_is_complete():
    links = re.findall(r"\]\((\w+)\.ipynb\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert links == NOTEBOOKS


def smaller(png: str) -> str:
    """A picture, base64 in and out, with 256 colours: a third of the bytes."""
    from PIL import Image

    file = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    for name in sys.argv[1:] or NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(name, Path(folder))
        for output in outputs(notebook):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
