"""Many runs of some notebooks, with other seeds, splits or data: on all cores, or on a cluster.

Dask distributed is the engine: it deals the runs out to workers and repeats those whose worker was lost. Each run is
executed by :mod:`nodules.tools.run`, in a folder of its own. What it found is kept under a key of its parameters, data
and code, and never computed twice.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, TextIO

import dask
import fsspec
import psutil
from distributed import Client, LocalCluster, as_completed, get_worker
from distributed.scheduler import KilledWorker

from nodules import course, paths, record
from nodules.errors import InputError, NotebookFailed, in_brief
from nodules.tools import run

MOST_RUNS = 100_000
MEMORY = 4e9  # bytes that a run may need
PATIENCE = "60 s"  # for a scheduler to answer
DASK = {
    **{"distributed.worker.profile.enabled": False, "distributed.admin.tick.interval": "1 s"},  # for cores to compute
    # A run waits at the scheduler until a worker is free: what waited at a worker was stolen by one about to be busy
    **{"distributed.scheduler.worker-saturation": 1.0, "distributed.scheduler.work-stealing": False},
}
TRIES = 5  # of a run whose scheduler was lost
LOCK = [paths.ROOT / "requirements.txt", paths.ROOT / "requirements-weights.txt"]
FIELDS = {"profile": str, "notebooks": list, "parameters": dict, "product": dict, "list": list}


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    label: str  # what varies, such as ``split_seed=1 seed=2``
    varied: dict[str, Any]
    notebooks: list[str]
    parameters: dict[str, Any]  # of all notebooks, what varies included
    key: str = ""
    folder: str = ""  # its run_dir
    store: str = ""


def read(path: Path) -> list[Job]:
    """The runs that a sweep's YAML file asks for, checked as profiles are.

    Raises:
        InputError: unreadable, or with a name or value that no notebook has.
    """
    from nodules import study  # takes seconds, which workers do not need

    plan = run.read_yaml(path)
    for name, value in plan.items():
        if name not in FIELDS:
            raise InputError(f"{path}: {name!r} is unknown; use {', '.join(FIELDS)}")
        if not isinstance(value, FIELDS[name]):
            raise InputError(f"{path}: {name} is {type(value).__name__}; compare params/sweeps/headline.yaml")
    if ("product" in plan) == ("list" in plan):
        raise InputError(f"{path}: says not what varies; name either product or list")
    lessons = [lesson.name for lesson in course.LESSONS]
    notebooks = plan.get("notebooks", lessons)
    if unknown := [name for name in notebooks if name not in lessons]:
        raise InputError(f"{path}: there is no notebook {unknown[0]!r}; use some of {', '.join(lessons)}")
    known = {name for each in notebooks for name in course.parameters(paths.NOTEBOOKS / f"{each}.ipynb")}
    base = paths.ROOT / "params" / f"{plan.get('profile', 'demo')}.yaml"
    parameters = run.read_profile(base) | plan.get("parameters", {})
    jobs = []
    for varied in _varied(path, plan):
        chosen = run.checked(path, parameters | varied)
        if unread := [name for name in varied if name not in known]:
            named = repr(unread[0])
            raise InputError(
                f"{path}: none of its notebooks has a parameter {named}; vary another, or add its notebook"
            )
        study.check({name: value for name, value in chosen.items() if name in {**study.RANGES, **study.CHOICES}})
        label = " ".join(f"{name}={value}" for name, value in varied.items())
        jobs.append(Job(label, varied, notebooks, chosen))
    return jobs


def _varied(path: Path, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """What is different in each run."""
    if "list" in plan:
        every = plan["list"]
    else:
        axes = plan["product"].values()
        if not all(isinstance(values, list) and values for values in axes):
            raise InputError(f"{path}: product names no list of values; write each as in seed: [0, 1, 2]")
        every = [dict(zip(plan["product"], values, strict=True)) for values in itertools.product(*axes)]
    if not (1 <= len(every) <= MOST_RUNS and all(isinstance(varied, dict) and varied for varied in every)):
        raise InputError(f"{path}: asks for {len(every)} runs; name 1 to {MOST_RUNS}, each a mapping of parameters")
    return every


def key(job: Job) -> str:
    """SHA-256 of all that a run's results depend on: parameters, data, code and the locked packages.

    Prose of notebooks and the drawing of figures are left out.
    """
    chosen = {name: run.merge(paths.NOTEBOOKS / f"{name}.ipynb", job.parameters, []) for name in job.notebooks}
    content = {"parameters": chosen, "code": _code(tuple(job.notebooks)), "data": _stamp(job)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@functools.cache
def _code(names: tuple[str, ...]) -> dict[str, Any]:
    """The code cells of notebooks, and hashes of the modules and locks that they depend on."""
    notebooks = [paths.NOTEBOOKS / f"{name}.ipynb" for name in names]
    files = {file for notebook in notebooks for file in run.modules(notebook)} | set(LOCK)
    hashes = {str(file.relative_to(paths.ROOT)): paths.sha256(file) for file in files if file.name != "plots.py"}
    return {"files": hashes} | {path.stem: [cell["source"] for cell in course.code_cells(path)] for path in notebooks}


def _stamp(job: Job) -> Any:
    """What tells whether a run's data have changed: a file's hash; sizes and times of the files in a folder."""
    data = job.parameters.get("data", "phantom")
    if data == "phantom":
        return None
    path = paths.DATA if data == "kaggle" else paths.resolve(data)
    if path.is_file():
        return paths.sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return [[str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


class Store:
    """What finished runs found, ``<key>.json`` each, in a folder or at any URL that fsspec knows, such as ``s3://``.

    Raises:
        InputError: fsspec can't reach it.
    """

    def __init__(self, url: str) -> None:
        try:
            self.files, self.root = fsspec.url_to_fs(url)
            self.files.makedirs(self.root, exist_ok=True)
        except (ImportError, ValueError, OSError) as error:
            raise InputError(
                f"{url}: can't be reached ({in_brief(error)}); name a folder, or install its package"
            ) from error

    def load(self, keys: list[str]) -> dict[str, dict[str, Any]]:
        """What runs found, by key; those that have finished."""
        there = {Path(name).name for name in self.files.ls(self.root, detail=False, refresh=True)}
        return {
            name: json.loads(self.files.cat_file(f"{self.root}/{name}.json"))
            for name in keys
            if f"{name}.json" in there
        }

    def keep(self, name: str, content: dict[str, Any]) -> None:
        """Write what a run found, whole or not at all."""
        with self.files.transaction, self.files.open(f"{self.root}/{name}.json", "wb") as file:
            file.write(json.dumps(content, default=lambda x: x.item()).encode())


def perform(job: Job) -> float:
    """Run a job's notebooks, in a Dask worker, and keep what they found; the seconds that it took.

    Raises:
        InputError: this machine's code or data are others than those of the machine that asks.
        NotebookFailed: a notebook failed.
    """
    if key(job) != job.key:
        raise InputError(f"{socket.gethostname()}: has other code, packages or data; bring it to the same revision")
    folder, started = paths.resolve(job.folder), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    limit = run.time_limit(job.parameters, None)
    with (
        _log_of(folder) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        _leash(),
    ):
        for name in job.notebooks:
            notebook = paths.NOTEBOOKS / f"{name}.ipynb"
            chosen = run.merge(notebook, job.parameters, [f"run_dir={job.folder}"])
            run.execute(notebook, folder / f"{name}.ipynb", chosen, limit)
    found = [record.load(folder / name) for name in job.notebooks]
    seconds = time.monotonic() - started
    content = {
        "varied": job.varied,
        "parameters": job.parameters,
        "notebooks": job.notebooks,
        "card": found[0]["card"],
        "provenance": {name: found[-1]["provenance"][name] for name in ("data", "simulation", "split", "git_revision")},
        "facts": {name: each["facts"] for name, each in zip(job.notebooks, found, strict=True)},
        "rows": [row for each in found for row in each["rows"]],
        "seconds": round(seconds, 1),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }
    store = Store(job.store)
    if "://" in job.store:  # a folder holds the run itself
        store.files.makedirs(f"{store.root}/{folder.name}", exist_ok=True)
        for name in job.notebooks:
            store.files.put_file(str(folder / f"{name}.ipynb"), f"{store.root}/{folder.name}/{name}.ipynb")
    store.keep(job.key, content)
    return seconds


@contextlib.contextmanager
def _log_of(folder: Path) -> Iterator[TextIO]:
    """A run's log, once nobody else writes to it: a worker that was cut off may still be in the run's folder."""
    with paths.alone(folder / "log.txt") as log:
        log.truncate(0)
        yield log


@contextlib.contextmanager
def _leash() -> Iterator[None]:
    """Kill this worker's kernels once nobody waits for its task any longer: Dask can't interrupt a running task."""
    worker, ended = get_worker(), threading.Event()
    name = worker.get_current_task()

    def watch() -> None:
        while not ended.wait(1):
            task = worker.state.tasks.get(name)
            if task is None or task.state == "cancelled":
                for child in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if "ipykernel_launcher" in " ".join(child.cmdline()):
                            child.kill()

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


@contextlib.contextmanager
def connected(scheduler: str, jobs: int) -> Iterator[Client]:
    """A client of a running scheduler, or, if none is named, of workers on all cores of this machine.

    Each worker has one run at a time, and all together as many threads as there are cores: two runs that compute on the
    same cores slow each other down many times over.

    Raises:
        InputError: no scheduler answers.
    """
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # it tells of each lost connection at length
    dask.config.set(DASK)
    if scheduler:
        try:
            client = Client(scheduler, timeout=PATIENCE)
        except (OSError, ValueError) as error:
            raise InputError(
                f"SCHEDULER={scheduler}: no scheduler answers ({in_brief(error)}); start one with: dask scheduler"
            ) from error
        with client:
            yield client
        return
    import torch  # takes seconds, which a cluster's client does not need

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    room = int(psutil.virtual_memory().available // MEMORY)
    workers = 1 if torch.cuda.is_available() else max(1, min(cores, room, jobs))
    threads = {name: str(max(1, cores // workers)) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    options = {"memory_limit": 0, "silence_logs": logging.CRITICAL, "dashboard_address": "127.0.0.1:0"}
    # Ctrl-C reaches a whole group of processes; workers leave it to this one, which ends them
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        cluster = LocalCluster(n_workers=workers, threads_per_worker=1, env=threads, **options)
    finally:
        signal.signal(signal.SIGINT, usual)
    with cluster, Client(cluster) as client:
        yield client


def run_all(jobs: list[Job], scheduler: str) -> dict[str, str]:
    """Run jobs and print a line as each ends; the reasons of those that failed, by label."""
    failed, lost, seconds, waiting = {}, 0, [], {job.key: job for job in jobs}
    while waiting:
        with connected(scheduler, len(waiting)) as client:
            print(f"{len(waiting)} runs; dashboard: {client.dashboard_link}", flush=True)
            # Of one group, which Dask queues; keys of their own would each be a group, and dealt out at once
            by_name = {("run", job.folder): job for job in waiting.values()}
            futures = client.map(perform, list(waiting.values()), key=list(by_name), pure=False)
            try:
                for future in as_completed(futures):
                    job = by_name[future.key]
                    if future.status not in ("finished", "error"):
                        continue  # its scheduler was lost; it is asked for again
                    del waiting[job.key]
                    told = _outcome(future)
                    if future.status == "error":
                        failed[job.label] = told.removeprefix("FAILED: ")
                    else:
                        seconds.append(future.result())
                        left = mean(seconds) * len(waiting) / max(1, len(client.nthreads())) / 60
                        told += f"; about {left:.0f} min left"
                    print(f"{len(jobs) - len(waiting)} of {len(jobs)}: {job.label}: {told}", flush=True)
            except OSError as error:
                print(f"lost {scheduler or 'the workers'}: {in_brief(error)}", flush=True)
            except KeyboardInterrupt:
                client.cancel(futures, force=True)
                raise
        lost += bool(waiting)
        if lost >= TRIES:
            return failed | {job.label: f"its scheduler was lost {lost} times" for job in waiting.values()}
    return failed


def _outcome(future: Any) -> str:
    """How a run ended, in a line."""
    if future.status == "finished":
        return f"{future.result():.0f} s"
    error = future.exception()
    if isinstance(error, KilledWorker):
        return "its workers died, killed or out of memory"
    return f"FAILED: {str(error).strip().splitlines()[-1]}"


def sweep(path: Path, folder: Path, scheduler: str = "", store: str = "") -> Path:
    """Run what a sweep asks for and has not been run yet, and write its report; the report's path.

    Args:
        path: the sweep's YAML file.
        folder: gets ``report.html``, ``runs.json`` (what all runs found) and figures.
        scheduler: the address of a running Dask scheduler; empty: workers on this machine.
        store: a folder that all machines share, or a URL; empty: ``runs/sweeps/<name>``.

    Raises:
        InputError: a sweep, scheduler or store that can't be used.
        NotebookFailed: some runs failed; the report shows the others.
    """
    from nodules.report import spread  # takes seconds, which workers do not need

    local = f"runs/sweeps/{path.stem}"
    if "://" not in store:
        store = local = str(paths.resolve(store or local))
    jobs = []
    for job in read(path):
        named, name = asdict(job), key(job)
        place = f"{local}/{job.label.replace(' ', ',').replace('/', '-')}-{name[:8]}"
        jobs.append(Job(**named | {"key": name, "store": store, "folder": place}))
    keys, kept = [job.key for job in jobs], Store(store)
    done, failed = kept.load(keys), {}
    for name, content in spread.kept(folder).items():  # of a report that came with the repository
        if name in keys and name not in done:
            kept.keep(name, content)
            done[name] = content
    print(f"{path.stem}: {len(jobs)} runs, of which {len(done)} are kept in {store}", flush=True)
    try:
        failed = run_all([job for job in jobs if job.key not in done], scheduler)
    finally:
        found = kept.load(keys)
        report = spread.build(path.stem, found, len(jobs), failed, folder) if found else None
    if failed:
        told = ", ".join(f"{label} ({why})" for label, why in failed.items())
        raise NotebookFailed(f"{path.stem}: {len(failed)} of {len(jobs)} runs failed, {told}; read their log.txt")
    if report is None:
        raise InputError(f"STORE={store}: no run is kept there, though all ended; name a folder that machines share")
    return report
