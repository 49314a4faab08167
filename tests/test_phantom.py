"""One smoke row of each kind on a CUDA device that is not there: no tensor is left on the CPU, and no training step
waits for the device."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from defectlab.gpu_check import kinds

TESTS = Path(__file__).parent


def run(root: Path, *command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=1200)


def test_the_phantom_keeps_its_promises() -> None:
    done = run(TESTS, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "phantom_promises.py"))
    assert done.returncode == 0, done.stdout


def test_a_row_of_each_kind_runs_on_a_gpu_without_a_wait_in_a_step(tmp_path: Path) -> None:
    chosen = kinds()
    assert len(chosen) > 25
    shutil.copytree(TESTS.parent / "defectlab", tmp_path / "defectlab")  # with runs of its own
    tasks = ",".join(f"{study}/{row}:0" for study, row in chosen.values())
    options = ["run", "all", "--profile", "smoke", "--device", "cuda", "--tasks"]
    done = run(tmp_path, str(TESTS / "phantom.py"), *options, tasks)
    assert done.returncode == 0, done.stderr
    waits = [line for line in done.stdout.splitlines() if line.startswith("wait ")]
    in_steps = [line for line in waits if line.startswith("wait step")]
    of_library = "training/torchvision_detectors.py"  # torchvision's detectors look at boxes one image after the other
    assert len(waits) > 50 and not [line for line in in_steps if of_library not in line]
