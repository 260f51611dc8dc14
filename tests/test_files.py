"""Publishing: the old file or the new one, never a piece."""

import errno
import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from ldm.files import FileHashes, FileVersion, atomic_write, read_json, rename_noreplace


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_readable_by_all(tmp_path):
    with atomic_write(tmp_path / "deep" / "a.txt") as draft:
        draft.write_text("new")
        assert not (tmp_path / "deep" / "a.txt").exists()
    path = tmp_path / "deep" / "a.txt"
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == 0o644
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("folder", [False, True])
def test_an_exception_leaves_what_was_there(tmp_path, folder):
    path = tmp_path / "a"
    for text in ("old", "new"):
        try:
            with atomic_write(path) as draft:
                if folder:
                    draft.mkdir()
                (draft / "x" if folder else draft).write_text(text)
                if text == "new":
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
    assert (path / "x" if folder else path).read_text() == "old" and names(tmp_path) == ["a"]


def test_a_folder_replaces_a_folder(tmp_path):
    for name in ("x", "y"):
        with atomic_write(tmp_path / "a") as draft:
            draft.mkdir()
            (draft / name).write_text(name)
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["y"]


def test_a_folder_that_is_claimed_replaces_nothing(tmp_path):
    with pytest.raises(FileExistsError), atomic_write(tmp_path / "a", rename_noreplace) as draft:
        draft.mkdir()
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "x").touch()
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["x"]
    with atomic_write(tmp_path / "b", rename_noreplace) as draft:
        draft.mkdir()
        (draft / "y").touch()
    assert names(tmp_path / "b") == ["y"]


@pytest.fixture(params=["links", "no links"])
def links(request, monkeypatch):
    """File systems that know hard links, and such as do not."""

    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refuse)


def test_of_many_that_claim_a_name_at_once_one_has_it(tmp_path, links):
    gate = Barrier(8)

    def write(k):
        try:
            with atomic_write(
                tmp_path / f"{k}", lambda draft, _: (gate.wait(), rename_noreplace(draft, tmp_path / "a"))
            ) as draft:
                draft.write_text(f"{k}")
        except FileExistsError:
            return None
        return f"{k}"

    with ThreadPoolExecutor(8) as pool:
        (winner,) = filter(None, pool.map(write, range(8)))
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == winner


def test_hashes_are_those_of_the_files_that_were_loaded(tmp_path, monkeypatch):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"one")
    b.write_bytes(b"two")
    versions = FileVersion.of(a), FileVersion.of(b)
    hashes = FileHashes({"both": versions, "first": versions[:1]})
    hashes.prefetch()
    assert dict(hashes) == {k: hashlib.sha256(v).hexdigest() for k, v in (("both", b"onetwo"), ("first", b"one"))}
    b.write_bytes(b"2")
    assert hashes["both"] == hashlib.sha256(b"onetwo").hexdigest()  # known: not read again
    with pytest.raises(ValueError, match="b: has changed since it was loaded"):
        FileHashes({"second": versions[1:]})["second"]


def test_a_pipe_in_place_of_a_json_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config\.json: not a regular file"):
        read_json(tmp_path / "config.json")
