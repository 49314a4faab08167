"""The commands for own images as a reader calls them, in the tests' process."""

import contextlib
import csv
import io
from pathlib import Path

from defectlab.__main__ import main


def call(*arguments: object, command: str = "detect") -> tuple[int, str]:
    """(exit code, all that was printed) of the command with these arguments."""
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(shown):
        code = main([command, *map(str, arguments), "--device", "cpu"])
    return code, shown.getvalue()


def works(*arguments: object, command: str = "detect") -> str:
    code, shown = call(*arguments, command=command)
    assert code == 0
    return shown


def fails(*arguments: object, command: str = "detect") -> str:
    """The one line of an error."""
    code, shown = call(*arguments, command=command)
    assert code == 1
    assert shown.startswith("error: ") and len(shown.splitlines()) == 1
    return shown


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
