"""Rows on the workers of a real cluster, in copies of the package with a toy study: what is computed where, what is
killed, what fails, what travels."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import toy_cluster
from toy_cluster import seen
from toy_study import call

from defectlab import files, provenance
from defectlab.batch import machines

TESTS = Path(__file__).parent
DEADLINE = 120  # seconds; the tests take a few


class Project:
    """A copy of the package with the toy study and its data."""

    def __init__(self, root: Path, data: str = "images") -> None:
        self.root = root
        package = Path(files.__file__).parent
        shutil.copytree(package, root / "defectlab", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(TESTS / "toy_cluster.py", root / "defectlab" / "studies" / "bsdrd.py")
        (root / "data").mkdir()
        (root / "data" / "toys.txt").write_text(data)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("DEFECTLAB_")}
        self.environment |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}

    def start(self, *command: str, log: str = "log") -> subprocess.Popen:
        with (self.root / log).open("w") as file:
            return subprocess.Popen(command, cwd=self.root, env=self.environment, stdout=file, stderr=file)

    def start_rows(self, options: str, log: str = "log") -> subprocess.Popen:
        command = f"-m defectlab run bsdrd --profile smoke --device cpu {options}"
        return self.start(sys.executable, *command.split(), log=log)

    def run(self, options: str) -> tuple[int, str]:
        """-> exit code, what it said."""
        code = self.start_rows(options).wait(DEADLINE)
        return code, (self.root / "log").read_text()

    def records(self) -> dict[str, dict]:
        return {path.stem: json.loads(path.read_text()) for path in sorted((self.root / "runs/smoke").glob("*.json"))}

    def results(self) -> dict[str, tuple]:
        """Key -> metrics and weights."""
        paths = {key: self.root / "runs/smoke" / f"{key}.safetensors" for key in self.records()}
        weights = {key: files.read_tensors(path)[0] if path.exists() else {} for key, path in paths.items()}
        plain = {key: {name: w.tolist() for name, w in of.items()} for key, of in weights.items()}
        return {key: (one["metrics"], plain[key]) for key, one in self.records().items()}

    def found(self, count: int, among: dict[str, tuple]) -> bool:
        results = self.results()
        return len(results) == count and all(among[key] == one for key, one in results.items())


def until(condition: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """Results of all planned rows, one after the other in one process."""
    project = Project(tmp_path_factory.mktemp("serial"))
    assert project.run("")[0] == 0
    return project.results()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


# --- One machine -----------------------------------------------------------------------------------------------------


def test_two_workers_give_what_one_process_gives(project: Project, undisturbed: dict[str, tuple]) -> None:
    code, said = project.run("--workers 2")
    assert code == 0, said
    assert project.results() == undisturbed and len(undisturbed) == 8
    assert "dashboard: http://127.0.0.1:" in said and "[8/8] bsdrd " in said
    assert {record["jobs"] for record in project.records().values()} == {2}
    assert {record["threads"] for record in project.records().values()} == {1}
    lines = seen(project.root)
    assert Counter(kind for kind, *_, text in lines if text == "end") == {"learns": 2, "looks": 2, "sleeps": 4}
    ends = {(kind, seed): float(moment) for kind, seed, _, moment, text in lines if text == "end"}
    assert all(ends["learns", seed] < ends["looks", seed] for seed in "01")
    one, other = ({pid for kind, s, pid, *_ in lines if (kind, s) == ("learns", seed)} for seed in "01")
    begin = max(min(float(m) for k, s, _, m, _ in lines if (k, s) == ("learns", seed)) for seed in "01")
    assert one != other and begin < min(ends["learns", "0"], ends["learns", "1"])  # at the same time


def test_a_killed_worker_gives_its_row_back(project: Project, undisturbed: dict[str, tuple]) -> None:
    """The row goes on from its checkpoint, and its result is the same."""
    parent = project.start_rows("--tasks looks:0 --workers 2")
    until(lambda: any(text == "epoch-15" for *_, text in seen(project.root)), parent)
    os.kill(int(seen(project.root)[-1][2]), signal.SIGKILL)
    assert parent.wait(DEADLINE) == 0, (project.root / "log").read_text()
    assert project.found(2, undisturbed)
    first, *_, last = (pid for kind, _, pid, *_ in seen(project.root) if kind == "learns")
    assert first != last
    epochs = Counter(text for _, _, pid, _, text in seen(project.root) if text.startswith("epoch") and pid == last)
    assert "epoch-10" not in epochs and epochs["epoch-39"] == 2


def test_a_row_that_fails_is_named_after_three_tries_and_the_others_run(project: Project) -> None:
    code, said = project.run("--tasks fails:0,looks_at_failed:0,dies:0,sleeps:0,sleeps:1 --workers 2")
    assert code == 1
    error = next(line for line in said.splitlines() if line.startswith("error: "))
    assert "bsdrd fails seed 0 (ValueError): boxes are not finite;" in error
    assert "bsdrd looks_at_failed seed 0 needs bsdrd fails seed 0, which failed" in error
    assert "bsdrd dies seed 0 its worker died 3 times" in error
    tries = Counter(kind for kind, *_, text in seen(project.root) if text == "begin")
    assert tries == {"fails": 3, "dies": 3, "sleeps": 2} and len(project.records()) == 2


def test_a_death_counts_against_the_row_that_ran(project: Project) -> None:
    code, said = project.run("--tasks dies:0,sleeps:0,sleeps:1,sleeps:2 --workers 1")
    assert code == 1 and "error: bsdrd dies seed 0 its worker died 3 times" in said
    assert len(project.records()) == 3 and said.count("failed") == 1


def test_missing_data_are_one_error_before_any_work(project: Project) -> None:
    (project.root / "data" / "toys.txt").unlink()
    code, said = project.run("--tasks looks:0,sleeps:0 --workers 2")
    assert code == 1 and said.count("toys.txt is missing") == 2 and seen(project.root) == []


def test_two_batches_do_not_compute_the_same_row(project: Project, undisturbed: dict[str, tuple]) -> None:
    batches = [project.start_rows("--workers 2", log) for log in ("log-1", "log-2")]
    assert [batch.wait(DEADLINE) for batch in batches] == [0, 0], (project.root / "log-2").read_text()
    assert project.results() == undisturbed
    ends = Counter((kind, seed) for kind, seed, *_, text in seen(project.root) if text == "end")
    assert set(ends.values()) == {1} and len(ends) == 8
    assert all("[8/8] bsdrd " in (project.root / log).read_text() for log in ("log-1", "log-2"))


def test_a_budget_of_minutes_is_kept_and_the_same_command_goes_on(project: Project) -> None:
    code, said = project.run("--tasks long:0 --workers 1 --minutes 0.12")
    assert code == 0 and "0.12 minutes are used up: 1 of 1 left; run again to go on" in said
    assert len(seen(project.root)) < 200 and project.records() == {}
    code, said = project.run("--tasks long:0 --workers 1")
    assert code == 0 and len(project.records()) == 1
    epochs = Counter(text for *_, text in seen(project.root))
    assert epochs.pop("end") == 1 and set(epochs.values()) == {2} and len(epochs) == 100  # none of them twice


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_command(project: Project, sign: signal.Signals) -> None:
    parent = project.start_rows("--rows learns --workers 2")
    try:
        until(lambda: len({pid for _, _, pid, *_ in seen(project.root)}) == 2, parent)
        children = psutil.Process(parent.pid).children(recursive=True)
    finally:
        parent.send_signal(sign)
        parent.wait(DEADLINE)
    assert psutil.wait_procs(children, timeout=20)[1] == []
    if sign == signal.SIGINT:
        assert parent.returncode == 130 and "stopped; the same command goes on" in (project.root / "log").read_text()


# --- A running cluster -----------------------------------------------------------------------------------------------


@pytest.fixture
def scheduler(project: Project) -> Iterator[str]:
    """The address of a scheduler without workers."""
    address = project.root / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard"]
    process = project.start(*command, "--host", "127.0.0.1", "--scheduler-file", str(address), log="scheduler-log")
    try:
        until(lambda: address.exists() and address.stat().st_size, process)
        yield json.loads(address.read_text())["address"]
    finally:
        process.terminate()
        process.wait(DEADLINE)


@pytest.fixture
def worker(tmp_path: Path, scheduler: str) -> Iterator[Callable[..., Project]]:
    """Start a worker from a copy of its own: no file is shared with the batch but what travels."""
    processes = []

    def start(data: str = "images", threads: int = 1, name: str = "far", added: str = "") -> Project:
        own = Project(tmp_path / name, data)
        with (own.root / "defectlab" / "__init__.py").open("a") as file:
            file.write(added)
        command = [sys.executable, "-m", "distributed.cli.dask_worker", scheduler, "--nthreads", str(threads)]
        processes.append(own.start(*command, "--name", name, "--no-dashboard"))
        return own

    yield start
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait(DEADLINE)


def test_no_file_system_is_shared(project: Project, scheduler: str, worker, undisturbed: dict[str, tuple]) -> None:
    """Records and weights come back, and those that a row needs are sent."""
    assert project.run("--tasks learns:0")[0] == 0
    far = worker()
    code, said = project.run(f"--tasks looks:0,looks:1 --scheduler {scheduler}")
    assert code == 0, said
    assert project.found(4, undisturbed)
    assert {(kind, seed) for kind, seed, *_, text in seen(far.root) if text == "end"} == {
        ("learns", "1"),
        ("looks", "0"),
        ("looks", "1"),
    }
    assert far.results() == project.results() and " on far)" in said


@pytest.mark.parametrize(
    "given, options, said",
    [
        ({"data": "other images"}, "", "has other data than the batch: fingerprint "),
        ({"threads": 2}, "", "takes 2 rows at once: start it with --nthreads 1"),
        ({"added": "# a line\n"}, "", "has other code than the batch: bring both to the same files"),
        ({}, "--device cuda", "cannot compute this row: device 'cuda' is not available here"),
    ],
    ids=["data", "threads", "code", "device"],
)
def test_a_worker_that_would_compute_something_else_is_refused(
    project: Project, scheduler: str, worker, given: dict, options: str, said: str
) -> None:
    far = worker(**given)
    code, found = project.run(f"--tasks looks:0 --scheduler {scheduler} {options}")
    assert "bsdrd looks seed 0 needs bsdrd learns seed 0, which failed" in found
    assert code == 1 and said in found and "error: bsdrd learns seed 0 worker far (" in found
    assert seen(far.root) == [] and project.records() == {}
    if "data" in given:
        own, other = (toy_cluster.hashlib.sha256(text.encode()).hexdigest()[:8] for text in ("images", "other images"))
        assert f"fingerprint {other}, not {own}" in found


def test_a_good_worker_that_dies_beside_a_bad_one_comes_back(project: Project, scheduler: str, worker) -> None:
    """Its row is not left to an address that nobody has any more, and its absence is not the end of the others."""
    bad, good = worker("other images", name="bad"), worker(name="good")
    code, said = project.run(f"--tasks sleeps:0,dies:0,sleeps:1,sleeps:2 --scheduler {scheduler}")
    assert code == 1 and "error: bsdrd dies seed 0 its worker died 3 times (out of memory?)\n" in said
    assert len(project.records()) == 3 and seen(bad.root) == []
    assert 1 <= sum(kind == "dies" for kind, *_ in seen(good.root)) <= 4


def test_a_bad_worker_does_not_take_the_rows_of_a_good_one(project: Project, scheduler: str, worker) -> None:
    bad, good = worker("other images", name="bad"), worker(name="good")
    code, said = project.run(f"--rows sleeps --scheduler {scheduler}")
    assert code == 0, said
    assert len(project.records()) == 4 and seen(bad.root) == [] and len(seen(good.root)) == 8


def test_a_stale_file_of_a_worker_is_not_read(project: Project, scheduler: str, worker, undisturbed) -> None:
    """Weights whose record is missing were left by a run that was killed; another run of the teacher is refused."""
    assert project.run("--tasks learns:0")[0] == 0
    (record,) = (project.root / "runs/smoke").glob("*.json")
    far = worker()
    folder = far.root / "runs" / "smoke"
    folder.mkdir(parents=True)
    (folder / record.name).with_suffix(".safetensors").write_bytes(b"of a run that was killed")
    code, said = project.run(f"--tasks looks:0 --scheduler {scheduler}")
    assert code == 0 and project.found(2, undisturbed), said
    shutil.copyfile(record, folder / record.name)
    (folder / record.name).write_text(record.read_text().replace('"seconds": ', '"seconds": 1'))
    code, said = project.run(f"--tasks looks:0 --scheduler {scheduler}")
    assert code == 0  # it is finished here
    for path in (project.root / "runs/smoke").glob("looks*"):
        path.unlink()
    code, said = project.run(f"--tasks looks:0 --scheduler {scheduler}")
    assert code == 1 and "worker far has another run of a row that is needed: delete" in said


def test_minutes_are_kept_without_a_worker(project: Project, scheduler: str) -> None:
    code, said = project.run(f"--tasks learns:0 --minutes 0.05 --scheduler {scheduler}")
    assert code == 0 and "0.05 minutes are used up: 1 of 1 left" in said


def test_a_stopped_batch_frees_the_worker(project: Project, scheduler: str, worker) -> None:
    far = worker()
    parent = project.start_rows(f"--tasks learns:0 --scheduler {scheduler}")
    until(lambda: len(seen(far.root)) > 5, parent)
    parent.send_signal(signal.SIGKILL)
    parent.wait(DEADLINE)
    code, said = project.run(f"--tasks sleeps:0 --scheduler {scheduler}")
    assert code == 0, said
    assert 5 < sum(kind == "learns" for kind, *_ in seen(far.root)) < 80


def test_no_scheduler_is_one_error(project: Project) -> None:
    code, said = project.run("--scheduler tcp://127.0.0.1:9")
    assert code == 1 and "error: no Dask scheduler answers at tcp://127.0.0.1:9" in said and "Traceback" not in said


# --- Slurm -----------------------------------------------------------------------------------------------------------

SBATCH = """#!/bin/sh
if [ "$1" = --test-only ]; then
  grep -q -- "-p gpu$" && exit
  echo "allocation failure: Invalid partition name specified" >&2
  exit 1
fi
cp "$1" {root}/job.sh
setsid sh {root}/job.sh > {root}/job.log 2>&1 &
echo "Submitted batch job $!"
"""
SCANCEL = """#!/bin/sh
for job; do kill -- "-$job"; done
"""


def test_jobs_of_slurm_compute_the_rows(project: Project, undisturbed: dict[str, tuple]) -> None:
    """With commands of that name that run the job here at once."""
    for name, text in {"sbatch": SBATCH, "scancel": SCANCEL}.items():
        path = project.root / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.format(root=project.root))
        path.chmod(0o755)
    project.environment["PATH"] = f"{project.root / 'bin'}:{os.environ['PATH']}"
    code, said = project.run("--tasks looks:0 --slurm partition=cpu")
    refused = "sbatch refuses such a job (allocation failure: Invalid partition name specified): change --slurm"
    assert code == 1 and said == f"error: {refused}\n"
    code, said = project.run("--tasks looks:0 --slurm partition=gpu,gpus=1,hours=1.5,cores=3")
    assert code == 0, said
    assert project.found(2, undisturbed)
    script = (project.root / "job.sh").read_text()
    asked = ["-p gpu", "--gres=gpu:1", "-t 01:30:00", "--cpus-per-task=3", "--mem=15G"]
    assert all(f"#SBATCH {one}\n" in script for one in asked) and 'export OMP_NUM_THREADS="3"' in script


def test_without_slurm_it_says_so(project: Project) -> None:
    code, said = project.run("--tasks looks:0 --slurm partition=gpu")
    assert code == 1 and said == "error: sbatch is not installed here: give --slurm on a login node of the cluster\n"


@pytest.mark.parametrize(
    "text, said",
    [
        ("queue=gpu", "'queue' is not one of partition=..., account=..., gpus=..., hours=..., cores=..., memory=..."),
        ("partition", "'partition' is not one of"),
        ("gpus=4", "a worker computes on one GPU"),
        ("hours=0", "hours and cores are numbers greater than 0"),
        ("cores=many", "hours and cores are numbers greater than 0"),
    ],
)
def test_what_slurm_is_not_asked_for(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        machines.slurm_options(text)


# --- GPUs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device, named, cards",
    [
        ("cuda", None, ["0", "1", "2", "3", "0", "1"]),
        ("cuda", "2,GPU-7f", ["2", "GPU-7f", "2", "GPU-7f", "2", "GPU-7f"]),
        ("cuda:1", None, ["1"] * 6),
        ("cpu", None, [None] * 6),
    ],
)
def test_each_worker_has_one_gpu_and_its_part_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, device: str, named: str | None, cards: list
) -> None:
    monkeypatch.setattr(machines.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(machines.os, "cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    found = machines.worker_environments(6, device)
    assert [one.get("CUDA_VISIBLE_DEVICES") for one in found] == cards
    assert {one["OMP_NUM_THREADS"] for one in found} == {"2"}
    assert [one[provenance.JOBS] for one in found] == [str(cards.count(card)) for card in cards]


def test_workers_and_a_scheduler_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run bsdrd --profile smoke --workers 2 --scheduler tcp://127.0.0.1:9") == 1
    assert "give one of the two" in capsys.readouterr().err


def test_without_dask_the_error_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "defectlab.batch.cluster", raising=False)
    monkeypatch.delattr("defectlab.batch.cluster", raising=False)
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert call("run bsdrd --profile smoke --workers 2") == 1
    assert "workers need Dask" in (said := capsys.readouterr().err) and ".[cluster]" in said
