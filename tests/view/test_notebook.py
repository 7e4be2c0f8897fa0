"""The notebook runs from top to bottom, and what it was committed with is what it shows."""

import json
import re
from pathlib import Path

import pytest

from tokmat_jax.generation.generator import Generator

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "tour.ipynb"


def said(notebook):
    """All that its code cells print."""
    return "".join("".join(output.get("text", "")) for cell in notebook["cells"] if cell["cell_type"] == "code"
                   for output in cell["outputs"])


# The kernel's own libraries warn of each other.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["run", "ar"])
def test_it_runs_on_a_run_and_on_a_model_without_a_tail(runs_dir, monkeypatch, name):
    import nbclient
    import nbformat

    monkeypatch.setenv("TOKMAT_WORKDIR", str(runs_dir / name))
    notebook = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"execute_result", "display_data", "stream"}
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    text = said(notebook)
    assert text.count("The meaning of life is") > 4
    generator = Generator.from_workdir(runs_dir / name)
    word = generator.tokenizer.encode(" love")[: 1 if generator.is_autoregressive else generator.settings.tail_length]
    [pinned] = re.findall(r"^pinned (.*)$", text, re.MULTILINE)
    assert generator.tokenizer.decode(word) in pinned
    assert "s = 2" in text
    assert text.count("tokens a pass") == 3


def test_it_is_committed_with_its_outputs_and_with_nothing_of_the_machine_it_ran_on():
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert all(cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)
    assert "s = 2" in said(notebook)
