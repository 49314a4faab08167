"""The page of a profile, self-contained: findings, forest plots, recorded tables, the hardest images, the notebooks."""

import base64
import html
import io
import json
import re
import warnings
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from defectlab import runs
from defectlab.figures import anomaly as anomaly_figures
from defectlab.figures import detection as detection_figures
from defectlab.figures.forest import forest
from defectlab.files import write_text
from defectlab.provenance import provenance, where
from defectlab.studies import STUDIES, Study, study
from defectlab.verdicts import tables
from defectlab.verdicts.findings import findings
from defectlab.verdicts.generated import shown_tables, split

PROFILE_SENTENCES = {
    "recorded": "The committed records: nothing was trained for this page.",
    "smoke": "Every row was trained for this page on synthetic data, with tiny settings, to see that all of it runs. "
    "The numbers below are not from that: they are the committed records of real runs.",
    "quick": "Real data and short training, also on a CPU; beside it the committed records.",
    "paper": "Real data and the papers' own settings, several seeds; beside it the committed records.",
}
FAILED = "The findings could not be built"
NO_TEXT = 'alt="No description has been provided for this image"'
MARK = "formula{:05d}here"  # where MathML goes once Markdown is HTML: the converter would close its tags one by one
FORMULA = re.compile(r"```.*?```|`[^`\n]*`|\$\$(.+?)\$\$|\$([^$\n]+(?:\n[^$\n]+)?)\$", re.DOTALL)


class NotebookStatus(NamedTuple):
    """What became of a notebook: "done", "done before", "failed", "out of time" (its budget) or "not started"."""

    name: str
    status: str
    seconds: float
    error: str


class IncompletePage(ValueError):
    """The page is written, but some part could not be built: it says so in its place. `path`: the page."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        super().__init__(f"{path} lacks {len(problems)} part(s): {'; '.join(problems)}")
        self.path = path


class Part(NamedTuple):
    """A part of a study on the page: a caption, its HTML, sentences below it, and why it could not be built."""

    caption: str
    html: str
    notes: list[str]
    problem: str


# --- Notebooks -------------------------------------------------------------------------------------------------------


def typeset(markdown: str, formulas: list[str]) -> str:
    """Markdown with a mark in place of each formula ($...$, $$...$$); its MathML, which browsers show offline, is
    appended to `formulas`. Code is kept."""
    from latex2mathml.converter import convert

    def one(found: re.Match[str]) -> str:
        block, inline = found.groups()
        if block is None and inline is None:
            return found[0]
        formulas.append(convert(block or inline, display="block" if block else "inline"))
        return MARK.format(len(formulas) - 1)

    return FORMULA.sub(one, markdown)


def write_html(executed: Path) -> None:
    """`<name>.html` beside an executed notebook, images and formulas inside: made, and read, without a network."""
    import nbformat
    from nbconvert import HTMLExporter

    target = executed.with_suffix(".html")
    if target.exists() and target.stat().st_mtime >= executed.stat().st_mtime:
        return
    notebook, formulas = nbformat.read(executed, as_version=4), []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = typeset(cell.source, formulas)
    plain = (
        "{% extends 'index.html.j2' %}{% block html_head_js_requirejs %}{% endblock %}"  # only widgets need it
        "{% block html_head_js_mathjax %}{% endblock %}"
    )
    exporter = HTMLExporter(template_name="lab", raw_template=plain, embed_images=True, mathjax_url="")
    body, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": executed.stem}})
    for number, formula in enumerate(formulas):
        body = body.replace(MARK.format(number), formula)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [m["alt"] for output in outputs for k, m in output.get("metadata", {}).items() if k.startswith("image/")]
    if len(texts) == body.count(NO_TEXT):  # the exporter does not know that images may have one
        for text in texts:
            body = body.replace(NO_TEXT, f'alt="{html.escape(text)}"', 1)
    write_text(target, body)


def outcomes_on_disk(folder: Path) -> list[NotebookStatus]:
    """What earlier calls left in `runs/<profile>/notebooks`."""
    found = []
    for path in folder.glob("*.ipynb"):
        if path.stem.endswith(".error"):
            found.append(NotebookStatus(path.stem.removesuffix(".error"), "failed", 0.0, ""))
        elif not path.stem.endswith(".running"):
            made = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("defectlab", {})
            status = "out of time" if made.get("cut_short") else "done before"
            found.append(NotebookStatus(path.stem, status, made.get("seconds", 0.0), ""))
    return found


# --- The page --------------------------------------------------------------------------------------------------------


def write_page(profile: str, results: list[NotebookStatus] | None = None) -> Path:
    """Write `runs/<profile>/index.html`, self-contained, and return its path. `results`: the notebooks of this call;
    those that earlier calls left in `runs/<profile>/notebooks` are added. IncompletePage, after writing, where a part
    could not be built: the page shows why in its place."""
    path = runs.runs_dir(profile) / "index.html"
    folder = path.parent / "notebooks"
    outcomes = sorted({o.name: o for o in [*outcomes_on_disk(folder), *(results or [])]}.values())
    pages = [f"{o.name}.error.html" if o.status == "failed" else f"{o.name}.html" for o in outcomes]
    store = cache(lambda: tables.record_store(profile))  # read once, where it is needed: it may fail
    studies = [(study(name).title, said(name, store), parts_of(name, profile, store)) for name in STUDIES]
    template = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    text = jinja2.Template(template, autoescape=True).render(
        profile=profile,
        sentence=PROFILE_SENTENCES[profile],
        where=where(),
        origin=provenance("cpu"),
        note=tables.NOTE,
        notebooks=[(o, page if (folder / page).exists() else "") for o, page in zip(outcomes, pages, strict=True)],
        hours=sum(o.seconds for o in outcomes) / 3600,
        failed=[o.name for o in outcomes if o.status == "failed"],
        here=len(runs.read_records(runs.runs_dir(profile), lambda line: None)),
        studies=studies,
        sortable=_library(),
    )
    write_text(path, text + "\n")
    problems = [
        f"{title}, {part.caption}: {part.problem}" for title, _, parts in studies for part in parts if part.problem
    ] + [f"{title}: {one}" for title, told, _ in studies for one in told if one.startswith(FAILED)]
    if problems:
        raise IncompletePage(path, problems)
    return path


def said(name: str, store: Callable[[], tables.RecordStore]) -> list[str]:
    """The findings of a study that hold, or why they cannot be said."""
    try:
        return [one.text for one in findings(name, store()) if one.holds]
    except ValueError as error:
        return [f"{FAILED}: {error}"]


def parts_of(name: str, profile: str, store: Callable[[], tables.RecordStore]) -> list[Part]:
    """Forest plot, claims, tables and hardest images of a study, those that have something to show."""
    of = study(name)
    builders = {
        "Differences": lambda: _forest(name, store()),
        "Claims": lambda: _table(tables.claims_table(name, profile, store())),
    }
    for table, caption in of.tables.items():
        builders[caption] = lambda table=table: _tables(of, name, table, profile, store())
    builders["The hardest images"] = lambda: _hardest(of, store())
    found = []
    for caption, build in builders.items():
        try:
            shown, notes = build()
        except Exception as error:  # whatever it is: the page names it, the rest of the page stands
            found.append(Part(caption, "", [], str(error) or type(error).__name__))
        else:
            if shown or notes:
                found.append(Part(caption, shown, notes, ""))
    return found


def _forest(name: str, store: tables.RecordStore) -> tuple[str, list[str]]:
    lines = tables.forest_lines(name, store)
    return (
        (_picture(forest(lines), "differences of the claims with their intervals", "svg+xml"), [])
        if lines
        else ("", [])
    )


def _tables(of: Study, name: str, table: str, profile: str, store: tables.RecordStore) -> tuple[str, list[str]]:
    """The parts of a printed table that have records, and one sentence each on the rest and on what differs."""
    built, rest, notes = [], "", {}
    for frame in shown_tables(of, name, table, profile, store):
        shown, missing, more = split(frame)
        rest = rest or missing
        notes |= dict.fromkeys(more)
        if len(shown):
            built.append(_table(shown)[0])
    return "".join(built), [*notes, *filter(None, [rest])]


def _table(frame: pd.DataFrame) -> tuple[str, list[str]]:
    """A table that can be sorted and filtered where scripts run, and read where they do not."""
    if not len(frame):
        return "", []
    flat = frame.copy()
    if isinstance(flat.columns, pd.MultiIndex):
        flat.columns = [", ".join(filter(None, column)) for column in flat.columns]
    flat = flat if isinstance(flat.index, pd.RangeIndex) else flat.reset_index()
    flat = flat[[column for column in flat if not flat[column].isin(["–", ""]).all()]]
    return flat.to_html(index=False, classes="sortable", border=0), []


def _hardest(of: Study, store: tables.RecordStore) -> tuple[str, list[str]]:
    """The examples that the record of the study's first row with some keeps, the worst first."""
    for name in of.rows[runs.RECORDED]:
        for record in store.recorded_of(of, name)[0][:1]:
            arrays = record.arrays
            if {"case_maps", "scores"} <= arrays.keys():
                figure = anomaly_figures.examples(record)
            elif {"case_scale", "prediction_boxes"} <= arrays.keys():
                figure = detection_figures.examples(record)
            else:
                continue
            origin = f"{name}, {record.data_label}, {record.profile}, seed {record.seed}"
            text = f"{origin}: missed defects and false alarms first"
            return _picture(figure, text, "jpeg"), [text]
    return "", []


def _picture(figure: Figure, text: str, kind: str) -> str:
    """A figure as an <img> with its content inside; `text`: in place of the image."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font of the figure lacks
        figure.savefig(file, format="svg" if kind == "svg+xml" else "jpeg", dpi=110)
    plt.close(figure)
    content = base64.b64encode(file.getvalue()).decode()
    return jinja2.Template(
        '<img alt="{{ text }}" src="data:image/{{ kind }};base64,{{ content }}">', autoescape=True
    ).render(text=text, kind=kind, content=content)


def _library() -> dict[str, Any]:
    """DataTables, as the package itables brings it: style and script."""
    folder = resources.files("itables") / "html"
    return {part: (folder / f"dt_bundle.{part}").read_text(encoding="utf-8") for part in ("css", "js")}
