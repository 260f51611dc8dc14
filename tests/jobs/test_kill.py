"""A job that is killed anywhere, and run again, ends as one that was not."""

import os
import random
import signal
import sys
from pathlib import Path

import pytest
from folders import fork, go, job_in, outcome

KILLS = int(os.environ.get("LDM_STRESS_KILLS", "15"))  # scripts/stress_batch.py asks for more
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod")  # of sys.audit
LIVES = 5  # of a job, before it is let live to its end


def mortal(folder, pipe, fatal, events=EVENTS):
    """A run in a fork that dies at its event number `fatal` under the job's folder; how it ended.

    Events are openings, renames, removals, new folders, and writes by `os.write`, of which half is written then.
    """
    seen, write = 0, os.write

    def counts():
        nonlocal seen
        seen += 1
        return seen == fatal

    def watch(event, words):
        if event in events and str(folder) in str(words[0]) and counts():
            os.kill(os.getpid(), signal.SIGKILL)

    def half(handle, data):
        if counts():
            write(handle, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(handle, data)

    def live():
        os.write = half
        sys.addaudithook(watch)
        return go(job_in(folder, pipe), pipe)

    return fork(live)


@pytest.mark.parametrize("story", range(-(-KILLS // LIVES)))
def test_a_job_that_is_killed_anywhere_ends_as_one_that_was_not(pipe, tmp_path, undisturbed, story):
    chance, folder = random.Random(story), tmp_path / "job"
    ends = [mortal(folder, pipe, chance.randrange(1, 120)) for _ in range(LIVES)]
    assert any(os.WIFSIGNALED(end) for end in ends)
    assert go(job_in(folder, pipe), pipe) == 0
    assert outcome(folder) == undisturbed


def test_a_line_that_is_torn_where_a_worker_dies_within_it_is_repaired(pipe, tmp_path, undisturbed):
    """Of the writes alone: the driver's lease, those of the items, their lines."""
    folder, torn = tmp_path / "job", 0
    for fatal in (9, 8, 7):
        mortal(folder, pipe, fatal, events=())
        torn += any(data and not data.endswith(b"\n") for data in map(Path.read_bytes, folder.glob("manifest-*")))
    assert torn and go(job_in(folder, pipe), pipe) == 0 and outcome(folder) == undisturbed
