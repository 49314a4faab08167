"""Shared fixtures: data scripts as modules, real sets unpacked once a session, a project of a file's own."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from defectlab import runs
from defectlab.data.synthetic import SYNTHETIC, ensure_synthetic

SCRIPTS = Path(__file__).parents[1] / "data_scripts"
ARCHIVES = {  # folder of a real set: script, archive, options
    "magnetic_tile": ("magnetic_tile", "magnetic-tile.zip"),
    "mvtec_ad/metal_nut": ("mvtec_ad", "mvtec_metal_nut_512.zip", "--category", "metal_nut"),
    "aitex": ("aitex", "AITEX_768.zip"),
    "neu_det": ("neu_det", "NEU-DET.zip"),
    "deep_pcb": ("deep_pcb", "DeepPCB.tar.xz"),
    "road_depth": ("road_depth", "road_rgbd_320.zip"),
    "bsdata": ("bsdata", "BSData_reduced.zip"),
    "neu_seg": ("neu_seg", "NEU-Seg.zip"),
    "elpv": ("elpv", "elpv_dataset-1.0.0.post1-py3-none-any.whl"),
}


def load_script(name: str) -> ModuleType:
    """`data_scripts/<name>.py` as a module (the folder is not a package)."""
    spec = importlib.util.spec_from_file_location(f"data_scripts_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    return load_script


def archive_of(folder: str) -> Path:
    """The archive of a real set in DEFECTLAB_ARCHIVES; without it the test is skipped, saying why."""
    archives, name = os.environ.get("DEFECTLAB_ARCHIVES"), ARCHIVES[folder][1]
    if not archives:
        pytest.skip("needs real data: set DEFECTLAB_ARCHIVES to the folder that holds the archives")
    if not (Path(archives) / name).is_file():
        pytest.skip(f"needs real data: {name} is not in DEFECTLAB_ARCHIVES")
    return Path(archives) / name


@pytest.fixture(scope="session")
def real_set(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """real_set(folder) -> the data root that holds the set.

    DEFECTLAB_DATA is used where it holds the set; else its archive is unpacked by the script itself, once a session.
    """
    root = tmp_path_factory.mktemp("data")

    def get(folder: str) -> Path:
        own = os.environ.get("DEFECTLAB_DATA")
        if own and (Path(own) / folder / "manifest.json").is_file():
            return Path(own)
        if (root / folder).is_dir():
            return root
        archive, (script_name, _, *options) = archive_of(folder), ARCHIVES[folder]
        status = load_script(script_name).main([*options, "--archive", str(archive), "--data-dir", str(root)])
        assert status == 0, f"{script_name}.py refused {archive.name}"
        return root

    return get


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with every synthetic set, written once a session: read only."""
    root = tmp_path_factory.mktemp("synthetic")
    for name in SYNTHETIC:
        ensure_synthetic(root, name)
    return root


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty project for the runs of one test file."""
    return tmp_path_factory.mktemp("project")


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty project folder in place of the repository, for runs and records."""
    monkeypatch.setattr(runs, "project_root", lambda: tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    """No figure stays open after a test; pyplot is not imported for it where nothing else has."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
