"""Data cards: what a reader must know of each real set, counted once and committed as results/data/<set>.json.

data_scripts/cards.py counts them from the whole sets; "fingerprint" says which files these were. So a page shows the
same numbers whether or not the set lies on the machine that made it.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd

from defectlab.data.splits import PARTS, SAMPLE, folder_of
from defectlab.files import DataError, project_root

SETS = (
    "magnetic_tile",
    "mvtec_ad/metal_nut",
    "aitex",
    "neu_det",
    "neu_seg",
    "deep_pcb",
    "road_depth",
    "bsdata",
    "elpv",
)
SIDES = np.geomspace(0.01, 1, 31)  # edges of the histograms in "sides": side of a box / side of its image


def card(name: str) -> dict[str, Any]:
    """The card of a set, by the name that its readers know (also of its sample, or another split of it).

    All cards have: name, label, page, licence, citation, command; "counted" ("images" or "boxes"), "classes", "parts":
    {"train": {"images": n, "classes": {class: n}}, "dev", "test"}; "pixels": {"width": [least, most], "height"};
    "identical_images": lists of files of one content; "leaks": the test images that show what a training image shows
    ("rule", "seen", "of"; of all sets but NEU-Seg the "threshold" from which a pair counts, and the most alike "pairs":
    training, test, similarity); "fingerprint" of the files, "split_fingerprint" as records have it. What else a card
    has is said in data_scripts/cards.py. DataError for a set without a card.
    """
    folder = folder_of(name)
    if folder not in SETS:
        raise DataError(f"there is no data card of {name!r}: choose one of {', '.join(SETS)}")
    path = project_root() / "results" / "data" / f"{folder.rpartition('/')[2]}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): restore it from the repository") from error


def facts(name: str) -> pd.DataFrame:
    """Where a set comes from and how large it is, a line for each fact."""
    found = card(name)
    (low, high), (least, most) = found["pixels"]["width"], found["pixels"]["height"]
    width, height = (f"{a}" if a == b else f"{a} to {b}" for a, b in ((low, high), (least, most)))
    lines = {
        "set": found["label"],
        "published in": found["citation"],
        "licence": found["licence"],
        "page": found["page"],
        "pixels": f"{width} × {height}",
        "get it": found["command"],
        "fingerprint of the files": found["fingerprint"][:16],
    }
    return pd.DataFrame(lines.items(), columns=["", "whole set"])


def table(name: str) -> pd.DataFrame:
    """Images of each part, and of each class the images or boxes."""
    found = card(name)
    return pd.DataFrame([counts(part, found["parts"][part], found["classes"]) for part in PARTS])


def counts(title: str, part: dict[str, Any], classes: list[str]) -> dict[str, Any]:
    """One line of `table`."""
    return {"part": title, "images": part["images"], **{name: part["classes"][name] for name in classes}}


def credit(name: str) -> str:
    """For a caption: whose the images are, and what may be done with them."""
    found = card(name)
    who = "; ".join(f"{paper.partition(':')[0]} {paper[-4:]}" for paper in found["citation"].split("; "))
    sample = "committed sample of " if name.startswith(SAMPLE) else ""
    return f"Images: {sample}{found['name']} ({who}); licence: {found['licence']}."
