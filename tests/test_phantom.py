"""One smoke row of each kind on a CUDA device that is not there: no tensor is left on the CPU, and no training step
waits for the device."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from defectlab.studies import STUDIES, study

TESTS = Path(__file__).parent
ON_THE_CPU = ("costs",)  # kinds that count a network's operations


def kinds() -> dict[tuple[str, str], str]:
    """A row of each kind of settings that smoke trains, and of each that looks at another's network."""
    found: dict[tuple[str, str], str] = {}
    for name in STUDIES:
        for row_name, row in study(name).rows["smoke"].items():
            model, of = row.settings.model, getattr(row.settings, "of", None)
            if row.seeds and not row.optional and not model.endswith(ON_THE_CPU):
                found.setdefault((model, getattr(of, "model", "")), f"{name}/{row_name}:0")
    return found


def run(root: Path, *command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{TESTS.parent}", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=1200)


def test_the_phantom_keeps_its_promises() -> None:
    done = run(TESTS, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "phantom_promises.py"))
    assert done.returncode == 0, done.stdout


def test_a_row_of_each_kind_runs_on_a_gpu_without_a_wait_in_a_step(tmp_path: Path) -> None:
    chosen = kinds()
    assert len(chosen) > 25
    shutil.copytree(TESTS.parent / "defectlab", tmp_path / "defectlab")  # with runs of its own
    options = ["run", "all", "--profile", "smoke", "--device", "cuda", "--tasks", ",".join(chosen.values())]
    done = run(tmp_path, str(TESTS / "phantom.py"), *options)
    assert done.returncode == 0, done.stderr
    waits = [line for line in done.stdout.splitlines() if line.startswith("wait ")]
    assert len(waits) > 50 and not [line for line in waits if line.startswith("wait step")]
