"""A batch of rows on several workers at once: the GPUs of one machine, a running Dask cluster, or jobs of Slurm.

A row is a task of a graph, after the rows that it needs (`Row.needs`); Dask (distributed, dask-jobqueue: the extra
"cluster") orders the tasks and gives those of a dead worker to another. A worker computes in `runs/<profile>/` of its
own checkout, and the files of a finished row travel to whoever needs them: no shared file system is needed. Where there
is one, a row goes on from its checkpoint, and two batches do not compute the same row. Dask's messages are pickles: use
a cluster in a network that you trust.
"""

import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from distributed import Client, Future, as_completed
from distributed.scheduler import KilledWorker
from tqdm import tqdm

from defectlab import runs
from defectlab.batch import RowsFailed, Task, headline, key_and_prints
from defectlab.batch.machines import TRIES
from defectlab.batch.worker import EVENTS, Job, compute, read_files, write_files
from defectlab.files import disk_full
from defectlab.runs import Record, first_line
from defectlab.studies import Row, study

# --- The graph -------------------------------------------------------------------------------------------------------


@dataclass
class Node:
    """A row and seed of the graph; `needs`: keys of others. `reason`: why it cannot be computed."""

    job: Job
    needs: list[str] = field(default_factory=list)
    record: Record | None = None  # of a run that is finished
    reason: str = ""


def graph(listed: list[Task], profile: str, device: str, ends: float | None) -> dict[str, Node]:
    """Key -> node, in the order of the list, each after those that it needs."""
    nodes: dict[str, Node] = {}

    def add(name: str, row_name: str, row: Row, seed: int) -> str:
        try:
            key, prints = key_and_prints(row, seed, profile)
        except Exception as error:  # data or weights that are not here
            key = f"{name} {row_name} {seed}"
            job = Job(name, row_name, seed, profile, device, key, {}, ends)
            nodes[key] = Node(job, reason=told(error))
            return key
        if key in nodes:
            return key
        node = Node(Job(name, row_name, seed, profile, device, key, prints, ends))
        path = runs.runs_dir(profile) / f"{key}.json"
        try:
            if path.exists():
                node.record = runs.read_record(path)
                runs.check_settings(node.record, row.settings)
        except ValueError as error:
            node.reason = told(error)
        if not (node.record or node.reason):
            rows = study(name).rows[profile]
            for settings, its_seed in row.needs(row.settings, seed):
                other = next(n for n, r in rows.items() if r.settings == settings)
                node.needs.append(add(name, other, rows[other], its_seed))
        return nodes.setdefault(key, node).job.key

    for task in listed:
        add(task.study, task.name, task.row, task.seed)
    return nodes


def told(error: BaseException) -> str:
    if isinstance(error, KilledWorker):
        return f"its worker died {TRIES} times (out of memory?)"
    return f"({type(error).__name__}): {first_line(error)}"


# --- The batch -------------------------------------------------------------------------------------------------------


def run_on(
    client: Client, listed: list[Task], profile: str, device: str, minutes: float | None, log: Callable = print
) -> list[Record]:
    """What `batch.run_tasks` does, on the workers of a cluster. A row that failed three times is named at the end."""
    nodes = graph(listed, profile, device, None if minutes is None else time.time() + 60 * minutes)
    futures = submitted(client, nodes)
    running, total = {}, len(futures)  # running: row -> worker
    with tqdm(total=total, unit="row", disable=None) as bar:

        def say(line: str) -> None:
            (bar.write if not bar.disable else log)(line)

        def begun(event: tuple[float, dict[str, str]]) -> None:
            running[event[1]["row"]] = event[1]["name"]
            bar.set_postfix_str(", ".join(f"{row} on {worker}" for row, worker in running.items()))

        client.subscribe_topic(EVENTS, begun)
        try:
            for future in as_completed(list(futures.values())):
                key = future.key.rpartition("-")[0]
                node, number = nodes[key], total - len(futures) + 1
                where = running.pop(str(node.job), "")
                if future.status == "finished":
                    if files := future.result():
                        write_files(files, runs.runs_dir(profile))
                        node.record = runs.read_record(runs.runs_dir(profile) / f"{key}.json")
                        said = f"{headline(node.record, node.job.study)}  ({node.record.seconds:.0f} s"
                        say(f"[{number}/{total}] {node.job}  {said}{where and f' on {where}'})")
                else:
                    error = future.exception() if future.status == "error" else RuntimeError(future.status)
                    if disk_full(error):
                        raise error
                    broken = [other for other in node.needs if nodes[other].reason]
                    node.reason = f"needs {nodes[broken[0]].job}, which failed" if broken else told(error)
                    say(f"[{number}/{total}] {node.job} failed {node.reason}")
                del futures[key]  # a result that nobody asks for any more leaves its worker
                bar.update()
        finally:
            client.cancel(list(futures.values()))  # what still runs stops at the end of its epoch
            client.unsubscribe_topic(EVENTS)
    open_rows = sum(not (node.record or node.reason) for node in nodes.values())
    if open_rows:
        log(f"{minutes:g} minutes are used up: {open_rows} of {len(nodes)} left; run again to go on")
    if failed := [f"{node.job} {node.reason}" for node in nodes.values() if node.reason]:
        raise RowsFailed("; ".join(failed))
    return [node.record for node in nodes.values() if node.record]


def submitted(client: Client, nodes: dict[str, Node]) -> dict[str, Future]:
    """Key -> future of each row that is to be computed. The first of the list come first."""
    batch = uuid.uuid4().hex[:8]  # two batches on one cluster keep their own tasks
    futures: dict[str, Future] = {}
    sent: dict[str, Future] = {}
    for key, node in nodes.items():
        broken = [other for other in node.needs if nodes[other].reason]
        if broken and not node.reason:
            node.reason = f"needs {nodes[broken[0]].job}, which failed"
        if node.reason or node.record:
            continue
        for other in node.needs:
            if nodes[other].record and other not in sent:
                with warnings.catch_warnings():  # weights in a message are meant
                    warnings.filterwarnings("ignore", message="Sending large graph")
                    sent[other] = client.submit(dict, read_files(nodes[other].record), pure=False)
        needed = [futures.get(other) or sent[other] for other in node.needs]
        options = {"key": f"{key}-{batch}", "retries": TRIES - 1, "priority": -len(futures), "pure": False}
        futures[key] = client.submit(compute, node.job, *needed, **options)
    return futures
