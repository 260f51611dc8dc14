"""The manifest: complete lines count, wherever a file ends; compaction makes the folder consistent with it."""

import errno
import json
import os

import pytest

from ldm.errors import InputWarning
from ldm.jobs.leases import Leases
from ldm.jobs.manifest import Manifest, append_manifest_record, compact_manifest


def line(name, status="done", number=1, **more):
    return {"id": name, "status": status, "line": number, "file": f"images/00/{name}.png", "sha256": "0", **more}


def read(folder):
    manifest = Manifest(folder)
    manifest.refresh()
    return manifest


def drawn(folder, *names):
    (folder / "images" / "00").mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / "images" / "00" / f"{name}.png").write_text(name)


def test_a_manifest_cut_at_any_byte_says_what_its_whole_lines_say(tmp_path):
    records = [line("a"), line("e", note="é\nb"), line("c", "failed", reason="?")]
    data = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    for cut in range(len(data) + 1):
        (tmp_path / "manifest.jsonl").write_bytes(data[:cut])
        whole = data[:cut].count(b"\n")
        found = read(tmp_path)
        assert sorted(found.done) + list(found.failed) == ["a", "e", "c"][:whole]


def test_a_reader_follows_what_is_appended_joined_and_torn(tmp_path):
    manifest = Manifest(tmp_path)
    append_manifest_record(tmp_path, "w", line("a", "failed", reason="no"))
    assert manifest.refresh() == {"a"} and manifest.failed == {"a": "no"}
    with (tmp_path / "manifest-w.jsonl").open("ab") as file:
        text = json.dumps(line("b")).encode()
        file.write(text[:9])
        file.flush()
        assert manifest.refresh() == set()
        file.write(text[9:] + b"\n")
    assert manifest.refresh() == {"b"} and manifest.done == {"b"}
    append_manifest_record(tmp_path, "v", line("a"))
    assert manifest.refresh() == {"a"} and manifest.failed == {} and manifest.done == {"a", "b"}
    drawn(tmp_path, "a", "b")
    with Leases(tmp_path / "leases") as leases:
        compact_manifest(tmp_path, leases)
    append_manifest_record(tmp_path, "u", line("c"))
    assert "c" in manifest.refresh() and manifest.done == {"a", "b", "c"}


@pytest.mark.parametrize("written", [0, 5])
def test_a_line_for_which_there_is_no_room_leaves_none(tmp_path, monkeypatch, written):
    append_manifest_record(tmp_path, "w", line("a"))
    before = (tmp_path / "manifest-w.jsonl").read_bytes()
    write = os.write

    def full(handle, data):
        if written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data[:written])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        append_manifest_record(tmp_path, "w", line("b"))
    monkeypatch.undo()
    assert (tmp_path / "manifest-w.jsonl").read_bytes() == before


def test_what_the_dead_wrote_is_joined_by_line_and_what_the_living_write_is_left(tmp_path):
    drawn(tmp_path, *"abcd")
    with Leases(tmp_path / "leases") as leases, Leases(tmp_path / "leases") as living:
        append_manifest_record(tmp_path, "dead-1", line("b", number=2))
        append_manifest_record(tmp_path, "dead-2", line("a", number=1))
        append_manifest_record(tmp_path, "dead-2", line("d", "failed", 4))
        append_manifest_record(tmp_path, living.worker, line("c", number=3))
        assert compact_manifest(tmp_path, leases, retry=()) == 0
        names = sorted(path.name for path in tmp_path.glob("manifest*"))
        assert names == [f"manifest-{living.worker}.jsonl", "manifest.jsonl"]
        ids = [json.loads(text)["id"] for text in (tmp_path / "manifest.jsonl").read_text().splitlines()]
        assert ids == ["a", "b", "d"]
        compact_manifest(tmp_path, leases, retry="d")
        assert read(tmp_path).failed == {} and read(tmp_path).done == {"a", "b", "c"}


def test_lines_whose_images_are_gone_or_changed_are_forgotten(tmp_path):
    import hashlib

    drawn(tmp_path, "a", "b", "c")
    for name in "abcd":
        append_manifest_record(
            tmp_path,
            "w",
            {**line(name), "file": f"images/00/{name}.png", "sha256": hashlib.sha256(name.encode()).hexdigest()},
        )
    (tmp_path / "images" / "00" / "b.png").write_text("B")
    with Leases(tmp_path / "leases") as leases:
        assert compact_manifest(tmp_path, leases) == 1 and read(tmp_path).done == {"a", "b", "c"}
        assert compact_manifest(tmp_path, leases, verify_hashes=True) == 1 and read(tmp_path).done == {"a", "c"}


def test_drafts_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    drawn(tmp_path, "a")
    folder = tmp_path / "images" / "00"
    for name in ("b", "c"):
        (folder / f".{name}.png.7.part").write_text("half")
    with Leases(tmp_path / "leases") as leases, Leases(tmp_path / "leases") as living:
        assert living.acquire("c")
        compact_manifest(tmp_path, leases)
        assert sorted(os.listdir(folder)) == [".c.png.7.part", "a.png"]


def test_an_empty_image_is_generated_again_and_malformed_lines_are_counted(tmp_path):
    drawn(tmp_path, "a", "b")
    for name in "ab":
        append_manifest_record(tmp_path, "w", {**line(name), "file": f"images/00/{name}.png"})
    (tmp_path / "images" / "00" / "b.png").write_bytes(b"")
    with (tmp_path / "manifest-w.jsonl").open("ab") as file:
        file.write(b'\xff{garbage\n[]\n{"id": "torn')
    with Leases(tmp_path / "leases") as leases:
        with pytest.warns(InputWarning, match="2 malformed lines are left out: .*manifest-w.jsonl"):
            assert compact_manifest(tmp_path, leases) == 1
        assert read(tmp_path).done == {"a"}
