"""The form of the committed notebooks: what each must have, so that a reader and `reproduce` can rely on it."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from defectlab.reproduce import PARAMETERS

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ABSOLUTE = re.compile(r"(?<![\w.:/<>~*+)\]}$])/[A-Za-z][\w.-]*/[\w.-]+|\b[A-Z]:\\+\w")
LONGEST_CELL, LARGEST_FILE = 30, 2_000_000  # lines, bytes


def parameter_problems(source: str) -> list[str]:
    try:
        given = {}
        for statement in ast.parse(source).body:
            (target,) = statement.targets
            given[target.id] = ast.literal_eval(statement.value)
    except (SyntaxError, ValueError, AttributeError) as error:
        return [f"the parameters cell holds more than `name = literal` ({error})"]
    problems = [] if sorted(given) == sorted(PARAMETERS) else [f"parameters are {sorted(given)}"]
    return problems + ([] if given.get("profile") in ("recorded", "smoke") else ["the default profile trains"])


def shown_text(output: dict) -> str:
    """What a reader sees of an output as text; embedded images left out."""
    data = output.get("data", {})
    parts = [output.get("text", ""), *(data.get(f"text/{kind}", "") for kind in ("plain", "html", "markdown"))]
    return re.sub(r"data:image/[^\"')]+", "", "\n".join(parts))


def problems_of(path: Path) -> list[str]:
    """What is wrong with a notebook, in words; [] for a good one."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    found = []
    if path.stat().st_size >= LARGEST_FILE:
        found.append(f"{path.stat().st_size} bytes")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not python3")
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    found += parameter_problems(tagged[0].source) if len(tagged) == 1 else [f"{len(tagged)} cells tagged `parameters`"]
    found += [f"a code cell of {n} lines" for c in code if (n := len(c.source.splitlines())) > LONGEST_CELL]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("not executed from top to bottom")
    if not outputs:
        found.append("no output")
    found += [f"error output {output.ename}" for output in outputs if output.output_type == "error"]
    texts = [cell.source for cell in notebook.cells] + [shown_text(output) for output in outputs]
    for text in texts:
        found += [f"machine path {match[0]}" for match in ABSOLUTE.finditer(text)]
        found += ["the path of this checkout"] if str(ROOT) in text else []
    return found


@pytest.mark.parametrize("path", NOTEBOOKS or [ROOT / "notebooks"], ids=lambda path: path.stem)  # none: fails
def test_notebook_is_in_form(path: Path):
    assert re.match(r"\d\d_[a-z0-9_]+\.ipynb$", path.name)
    assert problems_of(path) == []


# --- The checks themselves, on toys ----------------------------------------------------------------------------------

LITERALS = 'profile = "recorded"\ndevice = "auto"\nseeds = None\nminutes = None'


def toy(folder: Path, change=lambda notebook: None) -> Path:
    parameters = new_code_cell(LITERALS, metadata={"tags": ["parameters"]}, execution_count=1)
    figure = new_output("display_data", {"image/png": "ab+/cd/ef", "text/html": '<b>1</b>/<a href="http://x.org/a/b">'})
    work = new_code_cell(
        "print(3 / 2 / 1)", execution_count=2, outputs=[new_output("stream", text="12 images/s"), figure]
    )
    notebook = new_notebook(cells=[new_markdown_cell("$a/b$ and runs/smoke/x"), parameters, work])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    change(notebook)
    path = folder / "toy.ipynb"
    path.write_text(json.dumps(notebook))
    return path


def set_source(index: int, source: str):
    return lambda notebook: notebook.cells[index].update(source=source)


def test_a_good_notebook_has_no_problem(tmp_path: Path):
    assert problems_of(toy(tmp_path)) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda n: n.cells[1].metadata.clear(), "0 cells tagged"),
        (lambda n: n.cells[2].metadata.update(tags=["parameters"]), "2 cells tagged"),
        (set_source(1, LITERALS.replace("None", "list(range(3))", 1)), "more than `name = literal`"),
        (set_source(1, "import os\n" + LITERALS), "more than `name = literal`"),
        (set_source(1, LITERALS + "\nepochs = 3"), "parameters are"),
        (set_source(1, LITERALS.replace("recorded", "quick")), "default profile"),
        (lambda n: n.metadata.kernelspec.update(name="conda-env"), "kernel"),
        (set_source(2, "a = 1\n" * 31), "31 lines"),
        (lambda n: n.cells[2].update(execution_count=3), "top to bottom"),
        (lambda n: n.cells[2].update(outputs=[]), "no output"),
        (lambda n: n.cells[2].outputs.append(new_output("error", ename="KeyError", evalue="")), "KeyError"),
        (set_source(2, "open('/home/someone/x.txt')"), "/home/someone"),
        (lambda n: n.cells[2].outputs[0].update(text="wrote /srv/data/x"), "/srv/data"),
        (set_source(2, "open('C:\\\\x')"), "machine path C:"),
        (set_source(0, "x" * 2_000_000), "bytes"),
    ],
)
def test_each_problem_is_found(tmp_path: Path, change, named: str):
    (problem,) = problems_of(toy(tmp_path, change))
    assert named in problem
