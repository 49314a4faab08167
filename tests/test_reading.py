"""What a reader meets in the notebooks: words, links, texts for images, exercises that can be solved and failed."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# words of the trade have other names for these; see the glossary of notebook 00
UNWANTED = re.compile(r"\b(pictures?|waists?|stands? twice|tolls?|infinitely dear|an epoch's|telling cases)\b", re.I)
LONG = {"30", "31", "32", "33", "40", "41", "42"}  # at most 45 cells: method, training, results


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest):
    read = nbformat.read(request.param, as_version=4)
    read.path = request.param
    return read


def test_words_links_and_length(notebook) -> None:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert UNWANTED.findall(re.sub(r'"[^"]*"', "", text)) == []  # a paper's own words may have them
    for target in re.findall(r"\]\(([\w./-]+\.(?:ipynb|md|jpg))\)", text):
        assert (notebook.path.parent / target).exists(), f"a link to {target}, which is not there"
    assert notebook.path.name[:2] not in LONG or len(notebook.cells) <= 45


def test_every_image_has_a_text(notebook) -> None:
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for kind in {"image/png", "image/jpeg"} & set(output.get("data", {})):
                said = output.metadata.get(kind, {}).get("alt", "")
                assert len(said) > 15, f"an image without a text in its place: {cell.source[:60]!r}"


def test_exercises_have_blank_solution_and_check(notebook) -> None:
    kinds = [kind for cell in notebook.cells for kind in ("exercise", "solution", "check") if kind in tags(cell)]
    count = len(kinds) // 3
    assert kinds == ["exercise", "solution", "check"] * count
    for cell in notebook.cells:
        if "solution" in tags(cell):
            assert cell.metadata.get("jupyter", {}).get("source_hidden"), "a solution is folded"


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if '"exercise"' in p.read_text()], ids=lambda path: path.stem)
def test_every_blank_fails_its_check_kindly(path: Path) -> None:
    """As students get it: without the solutions, every check fails by an assertion that says what is expected."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "solution" not in tags(cell)]
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": ROOT / "notebooks"}})
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            if cell.cell_type != "code":
                continue
            if "check" not in tags(cell):
                client.execute_cell(cell, index)
                continue
            with pytest.raises(CellExecutionError) as failed:
                client.execute_cell(cell, index)
            assert failed.value.ename == "AssertionError", f"{failed.value.ename} in {cell.source[:80]!r}"
            assert len(failed.value.evalue) > 10, f"no word on what is expected: {cell.source[:80]!r}"
