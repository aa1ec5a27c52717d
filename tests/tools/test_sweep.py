"""Sweeps: what they ask for, and a real scheduler with worker processes that are killed, restarted and interrupted.

The runs of these tests execute a notebook of a few lines, in a copy of the project.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import nbformat
import pandas as pd
import psutil
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook

import soak
from nodules import course, paths
from nodules.errors import InputError
from nodules.report import spread
from nodules.tools import run, sweep

DASK = [sys.executable, "-m", "dask"]
# Stands in for the first lesson: its score follows from the seeds, and it takes as long as n_patches says
LESSON = """
import json, pathlib, time

time.sleep(n_patches / 1000)
if data == "broken":
    raise ValueError("it broke")
folder = pathlib.Path(run_dir) / "01_data"
folder.mkdir(parents=True, exist_ok=True)
ends = {end: 0.8 + seed / 100 + split_seed / 10 + d for end, d in (("", 0), ("_low", -0.05), ("_high", 0.05))}
scores = {name + end: value for name in ("auc", "accuracy") for end, value in ends.items()}
row = {"name": "ruler", "n": 20, "seed": seed, "split_seed": split_seed} | scores
facts = {"gain": 0.1 * (seed - 1), "gain_low": 0.1 * (seed - 1) - 0.05, "gain_high": 0.1 * (seed - 1) + 0.05}
known = {"data": "a test", "simulation": True, "split": "patient", "git_revision": "x"}
content = {"rows": [row], "facts": facts, "card": {"patches": 40}, "provenance": known, "files": {}, "left_out": []}
(folder / "results.json").write_text(json.dumps(content))
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the project whose first lesson takes moments."""
    (tmp_path / "project").mkdir()
    copy = soak.copy(tmp_path / "project")
    path = copy / "notebooks" / "01_data.ipynb"
    defaults = course.parameters(path)
    parameters = "\n".join(f"{name} = {value!r}" for name, value in defaults.items())
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), new_code_cell(LESSON)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    return copy


@pytest.fixture
def started():
    """Start processes, each in a group of its own, and end them all."""
    processes = []

    def start(command, project, log):
        with log.open("a") as file:
            environment = soak.environment(project, OMP_NUM_THREADS="1")
            processes.append(
                subprocess.Popen(
                    command, cwd=project, env=environment, stdout=file, stderr=file, start_new_session=True
                )
            )
        return processes[-1]

    yield start
    for process in processes:
        for child in family(process):
            child.kill()
        process.wait()


def family(process):
    """A process and all that it started; those that live."""
    try:
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def asking(project, name="some", milliseconds=1500, **plan):
    """Write a sweep's YAML file; its runs take so long."""
    plan = plan or {"product": {"seed": [0, 1], "split_seed": [0, 1]}}
    common = {"profile": "smoke", "notebooks": ["01_data"], "parameters": {"n_patches": milliseconds}}
    path = project / "params" / "sweeps" / f"{name}.yaml"
    path.write_text(yaml.safe_dump(common | plan, sort_keys=False))
    return path


def command(path, *more):
    folder = path.parents[2] / "figures" / path.stem
    return [sys.executable, "-m", "nodules", "sweep", str(path), str(folder), *more]


def until(holds, seconds=120, log=None):
    """Wait until something holds."""
    ends = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < ends, log.read_text() if log else "it never came"
        time.sleep(0.2)
    return found


def kept(project, name="some"):
    return sorted((project / "runs" / "sweeps" / name).glob("*.json"))


def running(project, name="some"):
    """The folders of runs that have begun."""
    return [path.parent for path in (project / "runs" / "sweeps" / name).glob("*/log.txt")]


def answers(port):
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def cluster(project, started, tmp_path):
    """A scheduler at a free port and functions that start it and workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "cluster.log"

    class Cluster:
        address = f"tcp://127.0.0.1:{port}"

        def scheduler(self):
            process = started(
                [*DASK, "scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"], project, log
            )
            until(lambda: answers(port), log=log)
            return process

        def worker(self):
            scratch = ["--local-directory", str(tmp_path / "scratch"), "--no-dashboard"]
            one = ["--no-nanny", "--nthreads", "1", "--memory-limit", "0"]
            return started([*DASK, "worker", self.address, *one, *scratch], project, log)

    return Cluster()


# What is asked for


def test_a_product_is_every_combination_and_a_list_what_it_says(tmp_path):
    def labels(**plan):
        (tmp_path / "s.yaml").write_text(
            yaml.safe_dump({"profile": "smoke", "notebooks": ["01_data"]} | plan, sort_keys=False)
        )
        return [job.label for job in sweep.read(tmp_path / "s.yaml")]

    assert labels(product={"seed": [0, 1], "split_seed": [5]}) == ["seed=0 split_seed=5", "seed=1 split_seed=5"]
    assert labels(list=[{"seed": 3}, {"data": "a.npz"}]) == ["seed=3", "data=a.npz"]
    asked = {path.stem: len(sweep.read(path)) for path in paths.ROOT.glob("params/sweeps/*.yaml")}
    assert asked == {"headline": 10, "recipe": 25}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("[1]", "not a mapping"),
        ("a: [", "can't be read as YAML"),
        ("seeds: [1]", "'seeds' is unknown; use profile, notebooks, parameters, product, list"),
        ("product: [1]", "product is list"),
        ("profile: smoke", "name either product or list"),
        ("{product: {seed: [1]}, list: [{seed: 1}]}", "name either product or list"),
        ("{product: {seed: 1}}", "names no list of values"),
        ("{product: {seed: []}}", "names no list of values"),
        ("{product: {}}", "asks for 1 runs; name 1 to 100000, each a mapping"),
        ("{list: [1]}", "each a mapping of parameters"),
        ("{list: []}", "asks for 0 runs"),
        ("{product: {sed: [1]}}", "no notebook has a parameter 'sed'"),
        ("{product: {seed: [a]}}", "seed: 'a' is str, not int"),
        ("{product: {seed: [-1]}}", "seed=-1: out of range"),
        ("{product: {seed: [1]}, notebooks: [x]}", "there is no notebook 'x'"),
        ("{product: {seed: [1]}, profile: x}", "x.yaml: can't be read"),
        ("{product: {epochs: [1, 2]}, notebooks: [01_data]}", "none of its notebooks has a parameter 'epochs'"),
        ("{product: {seed: [1]}, notebooks: []}", "none of its notebooks has a parameter 'seed'"),
    ],
)
def test_a_sweep_that_can_not_be_run_is_refused_in_one_line(tmp_path, plan, message):
    (tmp_path / "s.yaml").write_text(plan)
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        sweep.read(tmp_path / "s.yaml")
    assert "\n" not in str(refused.value)


def test_the_key_holds_parameters_data_and_code_but_no_prose(tmp_path, monkeypatch):
    data = tmp_path / "own.npz"
    data.write_bytes(b"1")
    job = sweep.Job("x", {}, ["01_data"], {"data": str(data), "seed": 0})
    first = sweep.key(job)

    def now():
        sweep._code.cache_clear()
        return sweep.key(job)

    assert now() == first
    assert sweep.key(sweep.Job("y", {}, ["01_data"], job.parameters | {"seed": 1})) != first
    assert sweep.key(sweep.Job("y", {"arms": 3}, ["01_data"], job.parameters | {"arm_epochs": 9})) == first, "not its"
    data.write_bytes(b"2")
    assert now() != first
    data.write_bytes(b"1")
    notebook = nbformat.read(paths.NOTEBOOKS / "01_data.ipynb", as_version=4)
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    notebook.cells[0].source += " More prose."
    nbformat.write(notebook, tmp_path / "01_data.ipynb")
    assert now() == first
    notebook.cells[-2].source += "\n1 + 1"
    nbformat.write(notebook, tmp_path / "01_data.ipynb")
    assert now() != first


def test_results_are_kept_at_any_address_that_fsspec_knows(tmp_path):
    for url in (str(tmp_path / "a" / "b"), "memory://runs"):
        store = sweep.Store(url)
        assert store.load(["k"]) == {}
        store.keep("k", {"auc": 0.5})
        assert sweep.Store(url).load(["k", "other"]) == {"k": {"auc": 0.5}}
    for url in ("nowhere://x", str(tmp_path / "a" / "b" / "k.json" / "c")):
        with pytest.raises(InputError, match="can't be reached"):
            sweep.Store(url)


def test_no_scheduler_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(sweep, "PATIENCE", "1 s")
    with (
        pytest.raises(InputError, match=re.escape("SCHEDULER=tcp://127.0.0.1:9: no scheduler answers")),
        sweep.connected("tcp://127.0.0.1:9", 1),
    ):
        pass


def test_a_run_waits_until_a_worker_that_was_cut_off_has_left_its_folder(tmp_path):
    (tmp_path / "log.txt").write_text("of an earlier attempt")
    entered = threading.Event()

    def enter():
        with sweep._log_of(tmp_path):
            entered.set()

    with sweep._log_of(tmp_path) as log:
        log.write("mine")
        second = threading.Thread(target=enter)
        second.start()
        assert not entered.wait(0.5)
        log.flush()
        assert (tmp_path / "log.txt").read_text() == "mine"
    second.join(10)
    assert entered.is_set()


# Real workers


@pytest.mark.slow
def test_a_failed_run_fails_alone_and_nothing_is_run_twice(project, tmp_path):
    runs = [{"seed": 0}, {"seed": 1}, {"seed": 2}, {"seed": 3, "data": "broken"}]
    path = asking(project, milliseconds=10, list=runs)
    environment = soak.environment(project)
    done = subprocess.run(command(path), cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and len(kept(project)) == 3, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: some: 1 of 4 runs failed, seed=3 data=broken (")
    assert "ValueError: it broke" in done.stderr
    assert "dashboard: http://127.0.0.1:" in done.stdout and len(done.stdout.splitlines()) == 6, "it does not flood"
    content = json.loads((project / "figures" / "some" / spread.RESULTS).read_text())
    assert (content["runs"], content["asked"], list(content["failed"])) == (3, 4, ["seed=3 data=broken"])
    assert "it broke" in (project / "figures" / "some" / "report.html").read_text()
    before = [file.stat().st_mtime_ns for file in kept(project)]

    path = asking(project, milliseconds=10, list=runs[:3])
    again = subprocess.run(command(path), cwd=project, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "3 runs, of which 3 are kept" in again.stdout
    assert [file.stat().st_mtime_ns for file in kept(project)] == before
    for file in kept(project):  # a report that came with the repository knows them, too
        file.unlink()
    again = subprocess.run(command(path), cwd=project, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and "3 runs, of which 3 are kept" in again.stdout


@pytest.mark.cluster
def test_a_killed_worker_s_run_is_repeated_elsewhere_and_two_sweeps_share_a_cluster(
    project, started, cluster, tmp_path
):
    cluster.scheduler()
    workers = [cluster.worker() for _ in range(2)]
    where = ["--scheduler", cluster.address]
    log, other = tmp_path / "sweep.log", tmp_path / "other.log"
    first = started(command(asking(project, milliseconds=3000), *where), project, log)
    second = started(command(asking(project, "twin", milliseconds=10), *where), project, other)
    until(lambda: running(project), log=log)
    busy = until(lambda: [w for w in workers if len(family(w)) > 1], log=log)[0]
    lost = family(busy)
    os.kill(busy.pid, signal.SIGKILL)
    assert first.wait(180) == 0 and second.wait(180) == 0, log.read_text() + other.read_text()
    assert len(kept(project)) == len(kept(project, "twin")) == 4
    until(lambda: not any(child.is_running() and child.status() != "zombie" for child in lost), 30)
    ours, theirs = (
        {
            tuple(run["varied"].values()): run["rows"]
            for run in map(json.loads, (file.read_text() for file in kept(project, n)))
        }
        for n in ("some", "twin")
    )
    assert ours == theirs


@pytest.mark.cluster
def test_a_restarted_scheduler_is_found_again(project, started, cluster, tmp_path):
    scheduler, log = cluster.scheduler(), tmp_path / "sweep.log"
    cluster.worker()
    path = asking(project, milliseconds=2000)
    asked = started(command(path, "--scheduler", cluster.address), project, log)
    (early,) = until(lambda: kept(project), log=log)
    written = early.stat().st_mtime_ns
    os.kill(scheduler.pid, signal.SIGKILL)
    scheduler.wait()
    cluster.scheduler()
    cluster.worker()
    assert asked.wait(180) == 0, log.read_text()
    assert len(kept(project)) == 4 and early.stat().st_mtime_ns == written, "what was kept was not run again"


@pytest.mark.cluster
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_sweep_leaves_nothing_and_goes_on_later(project, started, tmp_path, how):
    log, path = tmp_path / "sweep.log", asking(project, milliseconds=4000)
    asked = started(command(path), project, log)
    until(lambda: kept(project), log=log)
    until(lambda: len(running(project)) > 2, log=log)
    all_of_it = family(asked)
    if how == signal.SIGINT:
        os.killpg(asked.pid, how)  # as a terminal does
        assert asked.wait(60) == 130, log.read_text()
        assert "Traceback" not in log.read_text()
        assert 0 < json.loads((project / "figures" / "some" / spread.RESULTS).read_text())["runs"] < 4
    else:
        os.kill(asked.pid, how)
        asked.wait()
    until(lambda: not any(child.is_running() and child.status() != "zombie" for child in all_of_it), 60)
    count = len(kept(project))
    assert count < 4 and not list(project.rglob(f"{paths.PARTIAL}*.json"))
    again = started(command(path), project, log)
    assert again.wait(120) == 0 and f"4 runs, of which {count} are kept" in log.read_text()


@pytest.mark.cluster
def test_a_sweep_finds_the_same_as_make_figures(smoke_run, tmp_path):
    """With as many threads: other sums round otherwise."""
    lessons = ["01_data", "02_architectures", "06_picture_or_ruler"]
    plan = {"profile": "smoke", "notebooks": lessons, "list": [{"seed": 0}, {"seed": 1}]}
    (tmp_path / "same.yaml").write_text(yaml.safe_dump(plan))
    done = subprocess.run(
        [sys.executable, "-m", "nodules", "sweep", tmp_path / "same.yaml", tmp_path, "--store", tmp_path / "store"],
        capture_output=True,
        text=True,
        env=soak.environment(paths.ROOT),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / spread.RUNS).read_text()).values()
    (same,) = (run for run in found if run["varied"] == {"seed": 0})
    if same["threads"] != "1":
        pytest.skip("another number of threads than the run that it is compared with")
    alone = json.loads((paths.ROOT / "figures" / "smoke-phantom" / "results.json").read_text())["rows"]
    ours = [row for row in alone if row["notebook"] in lessons]
    pd.testing.assert_frame_equal(pd.DataFrame(same["rows"]), pd.DataFrame(ours), check_like=True)
    assert run.read_profile(paths.ROOT / "params" / "smoke.yaml").items() <= same["parameters"].items()
