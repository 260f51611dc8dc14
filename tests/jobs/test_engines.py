"""Engines: the same job under each, whoever dies."""

import multiprocessing
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from folders import Opens, fork, go, job_in, outcome
from kills import until

from ldm.jobs import driver, engines
from ldm.jobs.driver import State, Stuck, Watch
from ldm.jobs.engines import Inline, Local, places
from ldm.scheduler import Scheduler


def test_what_a_process_fails_by_is_the_job_s_reason_and_it_is_not_begun_again(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("multiprocessing.get_context", lambda kind, begin=multiprocessing.get_context: begin("fork"))
    local = Local(replace(job_in(tmp_path / "job", pipe), open=Opens(tmp_path / "nothing")), [None])
    until(lambda: not local.poll())
    assert len(local.reasons) == 1 and "nothing" in local.reasons[0]


def test_ray_that_is_not_there_is_said_with_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'ldm\[ray\]'"):
        engines.imported()


def test_workers_have_devices(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert places("local", None, "auto") == ["cuda:0", "cuda:1"] and places("local", 3, "cuda")[2] == "cuda:0"
    assert places("local", 2, "cpu") == [None, None] and places("inline", None, "auto") == [None]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert places("ray", None, "auto") == [None] and places("local", 4, "auto") == [None] * 4
    with pytest.raises(ValueError, match="--workers 2: the engine inline has one"):
        places("inline", 2, "auto")


class Idle:
    """An engine whose workers do nothing."""

    def __init__(self, reasons=()):
        self.reasons, self.asked = list(reasons), []

    def poll(self):
        return "stop" not in self.asked

    def stop(self):
        self.asked.append("stop")

    def kill(self):
        self.asked.append("kill")


@pytest.mark.parametrize("left", [{"a"}, set()])
def test_a_job_without_progress_ends_with_the_reason(pipe, tmp_path, left):
    """Unless nothing is left: then those who have not begun are not waited for."""
    job, now, told = job_in(tmp_path, pipe), iter(range(0, 10_000, 7)), []
    with job.leases() as leases:
        engine, watch = Idle(), Watch(job, leases, left, 100.0, lambda: next(now))
        if left:
            with pytest.raises(Stuck, match=r"no step was finished in 1\d\d seconds"):
                driver.drive(engine, watch, told.append)
        else:
            driver.drive(engine, watch, told.append)
        assert engine.asked == ["kill"] and told[0].left == len(left)


def test_progress_of_anybody_keeps_a_job_alive(pipe, tmp_path):
    job, now = job_in(tmp_path, pipe), iter(range(0, 10_000, 7))
    with job.leases() as leases, job.leases() as other:
        watch = Watch(job, leases, {"a"}, 100.0, lambda: next(now))
        for step in range(50):
            other.status = {"steps": step, "batch_size": 3}
            other._tell(other._beat)
            assert watch.state().batch_size == 3 and watch.idle() < 100


def test_a_worker_of_a_killed_driver_is_waited_for_and_its_lines_are_joined(
    pipe, finished, undisturbed, tmp_path, monkeypatch
):
    """It finished the last item, and leaves only when it has been waited for."""
    folder, ask, asked = Path(shutil.copytree(finished, tmp_path / "job")), Watch.others, []
    lines = (folder / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    orphan = job_in(folder, pipe).leases()
    (folder / "manifest.jsonl").write_bytes(b"".join(lines[:-2]))
    (folder / f"manifest-{orphan.worker}.jsonl").write_bytes(b"".join(lines[-2:]))

    def others(watch):
        asked.append(ask(watch))
        if len(asked) == 3:
            orphan.__exit__()
        return asked[-1]

    monkeypatch.setattr(Watch, "others", others)
    assert go(job_in(folder, pipe), pipe) == 0
    assert asked == [True, True, True, False] and outcome(folder) == undisturbed


def test_a_worker_at_other_items_is_not_waited_for_nor_one_that_hangs_for_ever(pipe, finished, tmp_path):
    folder, clock = Path(shutil.copytree(finished, tmp_path / "job")), iter(range(0, 10_000, 7))
    with job_in(folder, pipe).leases() as leases, job_in(folder, pipe).leases() as other:
        shutil.copy(folder / "manifest.jsonl", folder / f"manifest-{other.worker}.jsonl")
        job = job_in(folder, pipe)
        name = next(job.items(pipe)).id
        watch = Watch(job, leases, {name}, 100.0, lambda: next(clock))
        assert watch.others() and not Watch(job, leases, {"a"}, 100.0).others()
        driver.outlive(watch, 50.0)
        assert 50 < next(clock) < 200


def test_when_one_worker_fails_the_others_are_asked_to_stop(pipe, tmp_path):
    job, engine = job_in(tmp_path, pipe), Idle(["disk full"])
    with job.leases() as leases, pytest.raises(RuntimeError, match="disk full"):
        driver.drive(engine, Watch(job, leases, {"a"}, 100.0), lambda state: None)
    assert engine.asked == ["stop"]


def test_a_hanging_worker_ends_the_process_and_the_job_can_go_on(pipe, tmp_path, undisturbed, monkeypatch):
    folder = tmp_path / "job"

    def live():
        Scheduler._step = lambda self, asked: time.sleep(1000)
        driver.Watch.__init__.__defaults__ = (lambda: time.monotonic() * 100,)
        return go(job_in(folder, pipe), pipe, start=lambda job: Inline(job, [None]))

    assert os.waitstatus_to_exitcode(fork(live)) == 1
    assert go(job_in(folder, pipe), pipe) == 0 and outcome(folder) == undisturbed


def test_time_left_is_what_is_left_over_the_rate():
    assert State(4, 0, 6, 2.0, 1, 8).seconds_left == 3.0 and State(0, 0, 6, 0.0, 1, 8).seconds_left is None
