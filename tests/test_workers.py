"""Worker processes of a program that is interrupted or killed."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from nodules import workers

PROGRAM = """
import signal, time
from nodules.workers import processes

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background inherits that it is ignored
with processes(2) as executor:
    for done in executor.map(time.sleep, [0.3] * 200):
        print("done", flush=True)
"""


@pytest.mark.parametrize(("limit", "allowed"), [("3", 3), ("0", 1), ("", os.cpu_count()), ("4,2", os.cpu_count())])
def test_there_are_no_more_processes_than_threads_are_allowed(monkeypatch, limit, allowed):
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    assert workers.allowed() == allowed


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_program_that_started_them_and_say_nothing(how):
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert program.stdout.readline() == "done\n"
    workers = psutil.Process(program.pid).children(recursive=True)
    assert len(workers) >= 2
    if how == signal.SIGINT:
        os.killpg(program.pid, how)  # as a terminal does
    else:
        program.kill()
    _, said = program.communicate(timeout=30)
    assert said.count("Traceback") == (how == signal.SIGINT), "the program's own alone"
    ends = time.monotonic() + 30
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        assert time.monotonic() < ends
        time.sleep(0.1)
