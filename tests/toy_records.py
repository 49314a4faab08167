"""A toy study in a project of its own, and records of it written by hand: for the tests of tables and verdicts."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from defectlab import runs
from defectlab.files import write_json
from defectlab.studies import Row, Study
from defectlab.verdicts import claims, findings, generated, measured, page, tables

PRINTS = {"data": "d", "weights": "w"}
HEADER = "row,column,metric,unit,value,higher_is_better,status,key,not_comparable,source"


@dataclass(frozen=True)
class Settings:
    model: ClassVar[str] = "toy"
    version: ClassVar[int] = 1
    dataset: str = "toy_set"
    name: str = ""
    family: str = "v5"
    scale: str = "s"
    size: int = 640


def row(name: str, seeds: int = 1, **settings: Any) -> Row:
    return Row(Settings(name=name, **settings), None, None, fingerprints=lambda settings: PRINTS, seeds=seeds)


def toy_study(*names: str, metrics: tuple[tuple[str, ...], ...]) -> Study:
    rows = {profile: {name: row(name) for name in names} for profile in runs.PROFILES}
    return Study("A toy study", rows, {"main": "Toys"}, metrics)


def with_row(study: Study, profile: str, name: str, changed: Row) -> Study:
    return replace(study, rows={**study.rows, profile: {**study.rows[profile], name: changed}})


class Project:
    """A project with one study `toy` that has one printed table; claims and records are what a test writes."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, study: Study, table: str) -> None:
        self.root, self.papers = root, root / "results" / "papers" / "toy"
        self.papers.mkdir(parents=True)
        (self.papers / "main.csv").write_text(f"{HEADER}\n{table}")
        self.set = monkeypatch.setattr
        for module in (runs, tables, claims, findings, generated, measured):
            self.set(module, "project_root", lambda: root)
        for module in (generated, page):
            self.set(module, "STUDIES", ("toy",))
        self.set(measured, "BOOTSTRAP_REPEATS", 20)
        self.use(study)

    def use(self, study: Study) -> None:
        self.study = study
        for module in (tables, findings, generated, page):
            self.set(module, "study", lambda name: self.study)

    def write_claims(self, *ones: dict[str, Any]) -> None:
        lines = []
        for one in ones:
            lines += ["[[claim]]", *(f"{k} = {json.dumps(v)}" for k, v in one.items() if v is not None)]
        (self.papers / "claims.toml").write_text("\n".join(lines))

    def write_timings(self, milliseconds: Mapping[str, float]) -> None:
        """As `defectlab.bench` writes them, the first row first."""
        first = next(iter(milliseconds))
        found = {row: {"latency_ms": ms, "ratio": [ms / milliseconds[first]] * 3} for row, ms in milliseconds.items()}
        content = {"device": "a CPU", "first": first, "networks": found}
        write_json(self.root / "results" / "costs" / "toy-cpu.json", content)

    def write_record(
        self,
        name: str,
        seed: int,
        arrays: Mapping[str, np.ndarray],
        profile: str = "paper",
        here: bool = False,
        prints: dict[str, str] = PRINTS,
        **content: Any,
    ) -> Path:
        settings = self.study.rows[profile][name].settings
        key = runs.make_key("toy", settings.dataset, profile, seed, runs.row_identity(settings, profile), prints)
        known = {"key": key, "model": "toy", "version": 1, "profile": profile, "seed": seed, "date": "2026-11-21"}
        known |= {"dataset": settings.dataset, "settings": asdict(settings), "changed": runs.changed(settings)}
        known |= {"fingerprints": prints, "device": "one GPU", "seconds": 3600.0, "peak_memory_mb": 1.0, "threads": 1}
        known |= dict.fromkeys(("data_label", "precision", "commit"), "")
        known |= {"costs": {}, "curve": {"loss": [1.0, 0.5]}, "per_class": {}, "metrics": {}, "dev": {}, "versions": {}}
        path = (runs.runs_dir(profile) if here else runs.recorded_dir()) / f"{key}.json"
        write_json(path, known | content)
        np.savez_compressed(path.with_suffix(".npz"), key=key, **arrays)
        return path

    def judged(self, profile: str = "paper") -> list[claims.Judged]:
        return tables.judge_claims("toy", tables.record_store(profile))

    def verdicts(self, profile: str = "paper") -> dict[str, str]:
        return {one.claim["id"]: one.verdict for one in self.judged(profile)}
