"""A job that is killed anywhere, and run again, ends as one that was not."""

import os
import random
import signal
import sys

import pytest
from folders import fork, go, job_in, outcome

KILLS = int(os.environ.get("LDM_STRESS_KILLS", "20"))  # scripts/stress_batch.py asks for more
LIVES = 5  # of a job, before it is let live to its end


def mortal(folder, pipe, fatal):
    """A run in a fork that dies at its event number `fatal` under the job's folder; how it ended.

    Events are openings, renames, removals, new folders, and writes by `os.write`, of which half is written then.
    """
    seen, write = 0, os.write

    def counts():
        nonlocal seen
        seen += 1
        return seen == fatal

    def watch(event, words):
        if (
            event in ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod")
            and str(folder) in str(words[0])
            and counts()
        ):
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


def test_a_line_is_torn_where_a_worker_dies_within_it(pipe, tmp_path, undisturbed):
    """The events do fall within the writing of lines: without the repair this would fail."""
    torn = 0
    for fatal in range(20, 130, 3):
        folder = tmp_path / str(fatal)
        mortal(folder, pipe, fatal)
        torn += any(not path.read_bytes().endswith(b"\n") for path in folder.glob("manifest-*") if path.stat().st_size)
        if torn:
            break
    assert torn and go(job_in(folder, pipe), pipe) == 0 and outcome(folder) == undisturbed
