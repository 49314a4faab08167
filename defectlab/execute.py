"""The child process of `defectlab.reproduce`: `python -m defectlab.execute SOURCE TARGET PARAMETERS_AS_JSON`.

A module of its own so that it starts fast: it needs papermill, not torch.
"""

import json
import logging
import os
import sys
import threading
from pathlib import Path

import papermill


def end_with_parent() -> None:
    """Standard input is a pipe from the parent: its end says that the parent is gone, however it went."""
    os.read(0, 1)  # not sys.stdin: its lock, held here, would break the interpreter's own end
    os._exit(1)


def execute(source: Path, target: Path, parameters: dict) -> None:
    """Papermill saves the notebook after every cell, failing ones too. The kernel watches us and so ends with us."""
    papermill.execute_notebook(
        source,
        target,
        parameters,
        kernel_name="python3",
        progress_bar=False,
        log_output=True,
        cwd=source.parent,
    )


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    execute(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
