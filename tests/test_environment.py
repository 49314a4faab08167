"""The three descriptions of the environment say the same, and what is installed and imported is what they say."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
EXTRA = [*EXTRAS["dev"], *EXTRAS["cluster"]]
DIRECT = [canonicalize_name(Requirement(text).name) for text in [*PROJECT["dependencies"], *EXTRA]]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PINS = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LINES)}
PLATFORM = re.compile(r"nvidia-|cuda-|triton$")  # torch pins these itself, where there are any


def closure(direct: list[str]) -> set[str]:
    """Names of all installed distributions that are needed here, directly or not."""
    seen: dict[str, set[str]] = {}  # name -> its extras ("" is the package itself)
    waiting = [(name, {""}) for name in direct]
    while waiting:
        name, wanted = waiting.pop()
        new = wanted - seen.setdefault(name, set())
        seen[name] |= new
        for requirement in map(Requirement, metadata.requires(name) or [] if new else []):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in new):
                waiting.append((canonicalize_name(requirement.name), {"", *requirement.extras}))
    return set(seen)


def test_constraints_hold_exact_versions_the_same_on_every_platform():
    for line in LINES:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line), f"not an exact version: {line}"
    assert len(PINS) == len(LINES), "a package is named twice"
    assert not [name for name in PINS if PLATFORM.match(name)]


@pytest.mark.parametrize("name", DIRECT)
def test_direct_dependency_is_pinned_and_installed_so(name: str):
    assert name in PINS, f"{name} is in pyproject.toml, not in constraints.txt"
    assert metadata.version(name).partition("+")[0] == PINS[name]


def test_everything_needed_is_pinned():
    needed = {name for name in closure(DIRECT) if not PLATFORM.match(name)}
    assert needed <= set(PINS), f"not in constraints.txt: {sorted(needed - set(PINS))}"


# --- What the package imports ----------------------------------------------------------------------------------------

# a reader's, Dask's dashboard, what torchmetrics and torch import, and the script of the page's tables
TOOLS = {"jupyterlab", "bokeh", "ipykernel", "ipywidgets", "itables", "faster-coco-eval", "onnx"}


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """The first names of what is imported: `scipy` of `from scipy import ndimage`."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found - {"defectlab"}


MODULES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "defectlab").rglob("*.py")}


def test_what_is_imported_is_declared_and_the_reverse():
    names = set().union(*(imported(ast.walk(tree)) for tree in MODULES.values())) - sys.stdlib_module_names
    owners = metadata.packages_distributions()
    used = {canonicalize_name(owner) for name in names for owner in owners[name]}
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"] + EXTRAS["cluster"]}
    assert names and not {name for name in names if not {canonicalize_name(o) for o in owners[name]} & declared}
    assert not declared - used - TOOLS


def test_the_package_can_be_imported_on_windows():
    """Modules that only Unix has are imported where they are needed, not when the package is imported."""
    unix = {"fcntl", "grp", "pwd", "resource", "termios"}
    assert not [path.name for path, tree in MODULES.items() if imported(iter(tree.body)) & unix]


def test_conda_environment_is_made_of_the_same_files():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"]
    *packages, pip = environment["dependencies"]
    assert pip == {"pip": ["-c constraints.txt", "-e .[dev,cluster]"]}
    python, _, version = packages[0].partition("=")
    assert (python, packages[1:]) == ("python", ["pip"])
    assert f"{version}.0" in SpecifierSet(PROJECT["requires-python"])


def test_versions_of_the_package_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == metadata.version("defectlab")
    assert citation["title"] == PROJECT["name"]
    assert citation["license"] == PROJECT["license"]["text"] == "MIT"


def test_no_placeholder_is_left() -> None:
    for path in (ROOT / "README.md", ROOT / "results" / "tried.md"):
        assert not re.findall(r"@[A-Z0-9_]+@", path.read_text(encoding="utf-8")), path
