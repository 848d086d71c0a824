"""Execute the notebooks in place and keep their outputs: ``make demos``.

With MEMGEN_DEMO_STEPS set, training in the notebooks is cut to that many steps, with MEMGEN_DEMO_STORIES prompts are
fewer (the tests set both).
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(path: Path) -> nbformat.NotebookNode:
    """Run all cells of a notebook and return it with their outputs, progress bars and warnings left out."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": HERE}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    for path in [HERE / name for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        part = path.with_suffix(".part")
        nbformat.write(execute(path), part)
        part.replace(path)  # whole or not at all: a notebook is somebody's work
