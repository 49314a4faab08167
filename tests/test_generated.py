"""What is generated from the committed records: README's findings, the tables in `results/tables`, typeset formulas."""

import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from toy_records import Project, toy_study

from defectlab.verdicts import generated, page, tables

TABLE = "RD4AD,all,image_auroc,%,97.7,1,,rd4ad,other data,text\nBSDRD,all,image_auroc,%,98.1,1,,bsdrd,,text\n"


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    project = Project(tmp_path, monkeypatch, toy_study("rd4ad", "bsdrd", metrics=(("image_auroc", "aupro"),)), TABLE)
    (project.papers / "findings.toml").write_text(
        '[[finding]]\ntext = "RD4AD reaches {rd4ad.image_auroc:.0f}."\nwhen = "1"\nnotebooks = ["20"]\nreadme = true\n'
    )
    return project


def test_markdown_keeps_rows_and_drops_columns_without_values() -> None:
    columns = pd.MultiIndex.from_tuples([("image AUROC", "paper"), ("image AUROC", "recorded (quick)"), ("", "note")])
    frame = pd.DataFrame(
        [["97.7", "–", "a|b"], ["–", "–", ""]], index=pd.Index(["x", "y"], name="row"), columns=columns
    )
    assert generated.markdown(frame).splitlines() == [
        "| row | image AUROC, paper | note |",
        "| --- | --- | --- |",
        "| x | 97.7 | a\\|b |",
        "| y | – |  |",
    ]


def test_a_table_shows_what_is_recorded_and_one_line_on_the_rest(toy: Project) -> None:
    toy.write_record("rd4ad", 0, {}, "quick", metrics={"image_auroc": 77.0})
    text = generated.tables_markdown("toy", tables.record_store("recorded"))
    assert "RD4AD reaches 77. [quick, 1 seed]" in text and "| RD4AD | 97.7 | 77.0 | quick |" in text
    assert "Not run: BSDRD." in text and "- image AUROC, all rows: cannot be judged (other data)" in text


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "results" / "tables").glob("*.md")), ids=lambda p: p.stem
)
def test_tables_have_at_most_eight_columns(path: Path) -> None:
    heads = [line for line in path.read_text().splitlines() if line.startswith("| --- ")]
    assert heads and max(line.count("---") for line in heads) <= 8


def test_only_what_is_between_the_marks_is_replaced_and_meanwhile_edits_are_kept(
    toy: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.write_record("rd4ad", 0, {}, "quick", metrics={"image_auroc": 77.0})
    readme = toy.root / "README.md"
    readme.write_text("before\n")
    with pytest.raises(ValueError, match="has no place for the findings"):
        generated.update_generated()
    readme.write_text(f"before\n{generated.BEGIN}\nold\n{generated.END}\nafter\n")
    real = generated.readme_markdown

    def edited_meanwhile(store) -> str:
        readme.write_text(readme.read_text().replace("before", "edited"))
        return real(store)

    monkeypatch.setattr(generated, "readme_markdown", edited_meanwhile)
    assert readme in generated.update_generated()
    new = "- RD4AD reaches 77. [quick, 1 seed]"
    assert readme.read_text() == f"edited\n{generated.BEGIN}\n\n{new}\n\n{generated.END}\nafter\n"
    assert generated.update_generated() == []


def test_readme_and_tables_are_up_to_date() -> None:
    found = generated.generated().items()
    outdated = [path.name for path, text in found if not path.exists() or path.read_text() != text]
    assert not outdated, f"run `python -m defectlab report` and commit {outdated}"


def test_html_has_typeset_formulas_code_as_it_is_and_texts_of_images(tmp_path: Path) -> None:
    text = "Let $x_{2i}$ be\n\n$$a = b$$\n\nas in `cost $5$` and\n```\n$y$\n```"
    path = tmp_path / "one.ipynb"
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    shown = new_output("display_data", {"image/png": dot}, metadata={"image/png": {"alt": "a <dot>"}})
    cells = [new_markdown_cell(text), new_code_cell("", outputs=[shown])]
    path.write_text(nbformat.writes(new_notebook(cells=cells)))
    page.write_html(path)
    html = path.with_suffix(".html").read_text()
    assert html.count("<math") == 2 and 'display="block"' in html and re.search(r"<msub>\s*<mi>x</mi>", html)
    assert 'alt="a &lt;dot&gt;"' in html and "No description" not in html
    assert "cost $5$" in html and "$y$" in html and "formula0" not in html
