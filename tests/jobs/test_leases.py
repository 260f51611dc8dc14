"""Leases: one holder at a time, whoever dies, sleeps, or has a wrong clock."""

import os
import threading
import time

import pytest
from job_folders import fork

from ldm.jobs.leases import Leases


class Clock:
    """A machine's own time, which stands until it is told to pass."""

    now = 0.0

    def __call__(self):
        return self.now


def dead(folder, *names, boot=None):
    """A worker that got leases and was killed; its name."""
    read, write = os.pipe()

    def live():
        leases = Leases(folder, timeout=4.0, boot_id=boot)
        assert all(map(leases.acquire, names))
        os.write(write, leases.worker.encode())
        os.kill(os.getpid(), 9)

    fork(live)
    return os.read(read, 1000).decode()


def test_of_many_who_try_at_once_one_gets_it(tmp_path):
    dead(tmp_path, "b")
    workers = [Leases(tmp_path) for _ in range(8)]
    for name in ("a", "b"):
        got, start = [], threading.Barrier(len(workers))

        def attempt(leases, name=name, got=got, start=start):
            start.wait()
            if leases.acquire(name):
                got.append(leases)

        threads = [threading.Thread(target=attempt, args=(leases,)) for leases in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1 and got[0].holds(name)
    for leases in workers:
        leases.__exit__()


def test_a_lease_that_is_returned_is_free_and_one_that_is_held_is_not(tmp_path):
    with Leases(tmp_path) as a, Leases(tmp_path) as b:
        assert a.acquire("x") and not b.acquire("x") and not a.acquire("x") and not b.is_free("x")
        a.release("x")
        assert b.is_free("x") and b.acquire("x") and b.holds("x") and not a.holds("x")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_worker_of_this_machine_held_is_free_at_once_and_taken_once(tmp_path):
    worker = dead(tmp_path, "x")
    with Leases(tmp_path) as a, Leases(tmp_path) as b:
        assert not a.is_alive(worker) and a.is_alive(b.worker) and a.is_free("x")
        assert a.acquire("x") and not b.acquire("x")
        a.release("x")
        assert b.acquire("x") and not a.acquire("x")
        b.release("x")
        b.remove_stale(())
        assert sorted(path.suffix for path in tmp_path.iterdir()) == [".beat", ".beat"]


def test_one_who_looked_long_ago_gets_no_place_below_another_s(tmp_path, monkeypatch):
    """It saw no lease; meanwhile one was got, left by the dead, taken over, and the older file removed."""
    with Leases(tmp_path) as slow, Leases(tmp_path) as quick:
        look, looked = slow._lease_files, []

        def late(name):
            found = look(name)
            if not looked:
                looked.append(found)
                dead(tmp_path, "x")
                assert quick.acquire("x") and not (tmp_path / "x.0").exists()
            return found

        monkeypatch.setattr(slow, "_lease_files", late)
        assert not slow.acquire("x") and quick.holds("x") and looked == [[]]


def test_leases_of_what_is_done_are_swept(tmp_path):
    dead(tmp_path, "x", "y")
    with Leases(tmp_path) as leases:
        leases.remove_stale({"x"})
        assert [path.name for path in sorted(tmp_path.iterdir()) if path.suffix != ".beat"] == ["y.0"]


def test_a_worker_of_another_machine_lives_while_its_beat_changes_whatever_the_clocks_say(tmp_path):
    clock = Clock()
    with Leases(tmp_path, 4.0, boot_id="there") as far, Leases(tmp_path, 4.0, clock, boot_id="here") as near:
        assert far.acquire("x")
        beat = tmp_path / f"{far.worker}.beat"
        far._stop_event.set()
        far._thread.join()  # from here on it gives no sign of life but those below
        for changed in (10**18, 1, 4 * 10**18, 2):  # its clock, or the server's, jumps by decades
            os.utime(beat, ns=(changed, changed))
            assert near.is_alive(far.worker) and not near.acquire("x")
            clock.now += 3.9
            assert near.is_alive(far.worker)
            clock.now += 0.05
        clock.now += 1000  # nobody looked meanwhile, so nothing is known of then
        os.utime(beat, ns=(3, 3))
        assert not near.acquire("x")
        clock.now += 4.1
        assert near.acquire("x") and near.holds("x") and not far.holds("x")
        far.release("x")
        assert near.holds("x")


def test_living_workers_give_signs_of_life_and_say_how_they_are(tmp_path):
    with Leases(tmp_path, timeout=0.2, boot_id="there") as far, Leases(tmp_path, timeout=0.2, boot_id="here") as near:
        assert far.acquire("x")
        far.status = {"steps": 7}
        for _ in range(10):
            time.sleep(0.05)
            assert near.is_alive(far.worker) and not near.acquire("x")
        assert [status["steps"] for status in near.worker_statuses() if "steps" in status] == [7]


@pytest.mark.parametrize("content", [b"", b"\xff\x00\n", b"no newline", b"a/../b\n", b"x" * 10_000 + b"\n", None])
def test_a_lease_that_names_nobody_expires_by_its_own_age(tmp_path, content):
    path, clock = tmp_path / "x.0", Clock()
    path.mkdir() if content is None else path.write_bytes(content)
    with Leases(tmp_path, 4.0, clock) as leases:
        for _ in range(2):
            assert not leases.acquire("x")
            clock.now += 3
        assert leases.acquire("x") and leases.holds("x")
        leases.release("x")
        assert not list(tmp_path.glob("x.*"))


def test_a_beat_of_garbage_is_a_worker_of_another_machine(tmp_path):
    clock = Clock()
    (tmp_path / "w.beat").write_bytes(b"\x00[1")
    (tmp_path / "x.0").write_text("w\n")
    with Leases(tmp_path, 4.0, clock) as leases:
        assert leases.is_alive("w") and not leases.acquire("x")
        clock.now = 5.0
        assert not leases.is_alive("w") and leases.acquire("x")


def test_what_one_does_alone_is_not_done_by_two(tmp_path):
    inside = []

    def enter():
        with Leases(tmp_path) as leases:
            for _ in range(3):
                with leases.exclusive("m"):
                    inside.append(1)
                    assert len(inside) == 1
                    time.sleep(0.01)
                    inside.pop()

    failures = []
    threads = [threading.Thread(target=lambda: failures.append(1) if _raises(enter) else None) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def _raises(function):
    try:
        function()
    except AssertionError:
        return True
    return False
