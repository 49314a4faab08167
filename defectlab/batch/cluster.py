"""A batch of rows on several workers at once: the GPUs of one machine, a running Dask cluster, or jobs of Slurm.

A row comes after the rows that it needs (`Row.needs`); Dask (distributed, dask-jobqueue: the extra "cluster") keeps the
workers and gives the row of a dead one to another. A worker computes in `runs/<profile>/` of its
own checkout, and the files of a finished row travel to whoever needs them: no shared file system is needed. Where there
is one, a row goes on from its checkpoint, and two batches do not compute the same row. Dask's messages are pickles: use
a cluster in a network that you trust.
"""

import graphlib
import math
import time
import uuid
import warnings
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace

from distributed import Client, Future, wait
from distributed.scheduler import KilledWorker
from tqdm import tqdm

from defectlab import runs
from defectlab.batch import RowsFailed, Task, headline, key_and_prints
from defectlab.batch.machines import TRIES
from defectlab.batch.worker import CODE, EVENTS, Done, Job, compute, digest, read_files, write_files
from defectlab.files import DataError, disk_full
from defectlab.runs import Record, first_line
from defectlab.studies import Row, study

BUSY_SECONDS = 2  # before a row that another process computes is asked for again
SILENT_SECONDS = 60  # between two lines that say that there is no worker
DIED = "its worker died {} times (out of memory?)"
GRACE_SECONDS = 30  # in which a worker that died may come back

# --- The graph -------------------------------------------------------------------------------------------------------


@dataclass
class Node:
    """A row and seed of the graph; `needs`: keys of others."""

    job: Job
    needs: list[str] = field(default_factory=list)
    record: Record | None = None  # of a run that is finished
    reason: str = ""  # why it cannot be computed
    send: bool = False  # the files of what it needs: a worker lacked them
    after: float = 0.0  # not before this time (`time.monotonic()`)


def graph(listed: list[Task], profile: str, device: str, ends: float | None) -> dict[str, Node]:
    """Key -> node, in the order of the list, each after those that it needs."""
    nodes: dict[str, Node] = {}

    def add(name: str, row_name: str, row: Row, seed: int) -> str:
        try:
            key, prints = key_and_prints(row, seed, profile)
        except Exception as error:  # data or weights that are not here
            key = f"{name} {row_name} {seed}"
            job = Job(name, row_name, seed, profile, device, key, {}, ends, CODE)
            nodes[key] = Node(job, reason=told(error))
            return key
        if key in nodes:
            return key
        node = Node(Job(name, row_name, seed, profile, device, key, prints, ends, CODE))
        path = runs.runs_dir(profile) / f"{key}.json"
        try:
            if path.exists():
                node.record = runs.read_record(path)
                runs.check_settings(node.record, row.settings)
        except ValueError as error:
            node.reason = told(error)
        if not (node.record or node.reason):
            of = study(name)
            for settings, its_seed in row.needs(row.settings, seed):
                needed = of.row_with(settings, profile)
                other = next(one for one, known in of.rows[profile].items() if known is needed)
                node.needs.append(add(name, other, needed, its_seed))
        return nodes.setdefault(key, node).job.key

    for task in listed:
        add(task.study, task.name, task.row, task.seed)
    return nodes


def told(error: BaseException) -> str:
    if isinstance(error, KilledWorker):
        return DIED.format(error.allowed_failures + 1)
    return f"({type(error).__name__}): {first_line(error)}"


# --- The batch -------------------------------------------------------------------------------------------------------


def run_on(client: Client, listed: list[Task], profile: str, device: str, minutes: float | None) -> list[Record]:
    """What `batch.run_tasks` does, on the workers of a cluster. A row that failed three times is named at the end."""
    batch = Batch(client, graph(listed, profile, device, None if minutes is None else time.time() + 60 * minutes))
    batch.run()
    left = sum(not (node.record or node.reason) for node in batch.nodes.values())
    if left and minutes is not None:
        print(f"{minutes:g} minutes are used up: {left} of {len(batch.nodes)} left; run again to go on")
    if failed := [f"{node.job} {node.reason}" for node in batch.nodes.values() if node.reason]:
        raise RowsFailed("; ".join(failed))
    return [node.record for node in batch.nodes.values() if node.record]


class Batch:
    """As many rows at once as there are workers: a death then counts against the row that ran, not against all that
    wait. Files of needed rows go out with a row where its worker lacks them, so all see the same weights."""

    def __init__(self, client: Client, nodes: dict[str, Node]):
        self.client, self.nodes = client, nodes
        self.sorter = graphlib.TopologicalSorter({key: node.needs for key, node in nodes.items()})
        self.sorter.prepare()
        self.names = {str(node.job) for node in nodes.values()}
        self.open = [node for node in nodes.values() if not (node.record or node.reason)]
        self.ready: list[str] = []
        self.futures: dict[Future, str] = {}  # -> key
        self.tries: Counter[str] = Counter()
        self.refused: dict[str, str] = {}  # address of a worker that computes something else -> why
        self.met: dict[str, float] = {}  # address of a worker -> when it was last there
        self.only: dict[Future, list[str]] = {}  # the workers that may compute it, where not all may
        self.running: dict[str, str] = {}  # row -> worker
        self.spoken = time.monotonic()
        self.bar = tqdm(total=len(self.open), unit="row", disable=None)

    def say(self, line: str) -> None:
        (print if self.bar.disable else self.bar.write)(line)

    def begun(self, event: tuple[float, dict[str, str]]) -> None:
        if event[1]["row"] not in self.names:  # another batch's
            return
        self.running[event[1]["row"]] = event[1]["name"]
        self.bar.set_postfix_str(", ".join(f"{row} on {worker}" for row, worker in self.running.items()))

    def run(self) -> None:
        self.client.subscribe_topic(EVENTS, self.begun)
        try:
            with self.bar:
                while self.step():
                    pass
        finally:
            self.client.cancel(list(self.futures))  # what still runs stops at the end of its epoch
            self.client.unsubscribe_topic(EVENTS)

    def step(self) -> bool:
        """Hand out what can be computed, and take what comes back within a second; -> whether anything is left."""
        while keys := self.sorter.get_ready():
            for key in keys:
                node = self.nodes[key]
                broken = [other for other in node.needs if self.nodes[other].reason]
                if broken:
                    node.reason = node.reason or f"needs {self.nodes[broken[0]].job}, which failed"
                if node.record or node.reason:
                    self.sorter.done(key)
                    self.bar.update(bool(broken))
                else:
                    self.ready.append(key)
        ends = next(iter(self.nodes.values())).job.ends if self.nodes else None
        late = ends is not None and time.time() > ends
        there = self.workers()
        if self.refused and not there and not self.awaited():  # nobody is left who would compute what is asked for
            for key in (failed := self.ready):
                self.nodes[key].reason = next(iter(self.refused.values()))
                self.finish(key, f"failed: {self.nodes[key].reason}")
            self.ready = []
            if failed:
                return True  # what needs these is told so
        if late:
            self.ready.clear()
        if not (self.ready or self.futures) or (late and not there):
            return False
        order = {key: place for place, key in enumerate(self.nodes)}
        now = time.monotonic()
        for key in sorted(self.ready, key=lambda key: (self.nodes[key].after, order[key])):
            if len(self.futures) < len(there) and self.nodes[key].after <= now:
                self.ready.remove(key)
                self.submit(key, there)
        if not there and now - self.spoken > SILENT_SECONDS:
            self.spoken = now
            self.say("no worker has come yet")
        self.give_back(there)
        if not self.futures:
            time.sleep(0.2)
            return True
        try:
            done = wait(list(self.futures), timeout=1, return_when="FIRST_COMPLETED").done
        except TimeoutError:
            done = set()
        except CancelledError as error:
            raise DataError("the scheduler is gone; finished rows are kept: start it and this command again") from error
        for future in done:
            self.take(future, self.futures.pop(future))
        return True

    def workers(self) -> list[str]:
        """Addresses of those that may be given rows. DataError where the scheduler is gone."""
        try:
            there = list(self.client.nthreads())
        except OSError as error:
            raise DataError(f"the scheduler does not answer any more ({first_line(error)}): start it again") from error
        self.met |= dict.fromkeys(there, time.monotonic())
        return [address for address in there if address not in self.refused]

    def awaited(self) -> bool:
        """Whether a worker that is not refused was there a moment ago: it comes back under another address."""
        last = max((seen for address, seen in self.met.items() if address not in self.refused), default=-math.inf)
        return time.monotonic() - last < GRACE_SECONDS

    def give_back(self, there: list[str]) -> None:
        """Take back the rows that only workers may compute that are gone."""
        for future, addresses in list(self.only.items()):
            if future.done() or set(addresses) & set(there):
                continue
            del self.only[future]
            key = self.futures.pop(future)
            self.client.cancel([future])
            self.running.pop(str(self.nodes[key].job), "")
            self.try_again(key, DIED.format(TRIES))

    def try_again(self, key: str, why: str) -> None:
        """Up to three times in all."""
        self.tries[key] += 1
        if self.tries[key] < TRIES:
            self.ready.append(key)
            return
        self.nodes[key].reason = why
        self.finish(key, f"failed {why}")

    def submit(self, key: str, there: list[str]) -> None:
        node = self.nodes[key]
        needed = [self.nodes[other].record for other in node.needs]
        hashes = tuple((record.path.name, digest(record.path.read_bytes())) for record in needed)
        files = [read_files(record) for record in needed] if node.send else []
        with warnings.catch_warnings():  # weights in a message are meant
            warnings.filterwarnings("ignore", message="Sending large graph")
            job, name = replace(node.job, needs=hashes), f"{key}-{uuid.uuid4().hex[:8]}"
            only = {"workers": there} if self.refused else {}  # a worker that died comes back under another address
            future = self.client.submit(compute, job, files, key=name, pure=False, **only)
        self.futures[future] = key
        if only:
            self.only[future] = there

    def take(self, future: Future, key: str) -> None:
        """What became of a row that was handed out. One that failed is tried again, up to three times in all."""
        node, where = self.nodes[key], self.running.pop(str(self.nodes[key].job), "")
        self.only.pop(future, None)
        try:
            done: Done = future.result()
            if done.files:
                folder = runs.runs_dir(node.job.profile)
                write_files(done.files, folder)
                node.record = runs.read_record(folder / f"{key}.json")
        except Exception as error:
            if disk_full(error):
                raise
            if isinstance(error, KilledWorker):
                self.tries[key] = TRIES
            self.try_again(key, told(error))
            return
        if node.record:
            seconds = f"{node.record.seconds:.0f} s on {where or done.worker}"
            self.finish(key, f"{headline(node.record, node.job.study)}  ({seconds})")
        elif done.reason != "late":
            node.send |= done.reason == "missing"
            node.after = time.monotonic() + (BUSY_SECONDS if done.reason == "busy" else 0)
            self.ready.append(key)
            if done.refused:
                self.refused[done.address] = done.refused
                self.say(f"{done.refused}; it gets no more rows")

    def finish(self, key: str, line: str) -> None:
        self.sorter.done(key)
        self.bar.update()
        finished = sum(bool(node.record or node.reason) for node in self.open)
        self.say(f"[{finished}/{len(self.open)}] {self.nodes[key].job}  {line}")
