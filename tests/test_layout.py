"""The house: which room may import which, how large it may be, and that no import runs in a circle or upward."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "defectlab"
FLOORS = (  # from the ground up; a room imports from its own floor's module list below it, never from above or beside
    {"files", "precision", "geometry"},
    {"networks", "provenance"},
    {"papers", "data", "metrics", "runs"},
    {"training"},
    {"studies"},
    {"verdicts", "figures"},
    {"batch"},
    {"own", "bench", "reproduce", "__main__"},
)
BESIDE = {  # what a room imports of its own floor
    "data": set(),
    "papers": set(),
    "metrics": {"data"},
}
LINES = {"defectlab": 12_500, "tests": 13_500}  # and no module above:
MOST = 400


def modules() -> dict[str, Path]:
    """'networks.yolo.model' -> its file; a package stands for its __init__."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules of the package that a file imports, wherever in the file the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "defectlab":
            base = node.module.removeprefix("defectlab").lstrip(".")
            inside = {f"{base}.{alias.name}".lstrip(".") for alias in node.names} & known
            found |= inside or {base}
    return found - {""}


GRAPH = {name: imports(path, set(modules())) for name, path in modules().items() if name}
