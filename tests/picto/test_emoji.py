"""The build of the emoji data set: matching of names, honest failure, all or nothing. No npm, no network."""

import base64
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ldm.picto import emoji
from ldm.picto.sprites import read_sprites

ROOT = Path(__file__).parents[2]
THINGS = {
    "1F34E": ("red apple", "🍎", "#d33"),
    "1F697": ("automobile", "🚗", "#33d"),
    "1F431": ("cat face", "🐱", "#fa3"),
}


def tarball(path, files):
    """An npm package with these files: name -> content, str or bytes or what JSON can say."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def names_package():
    groups = [{"order": 0, "key": "objects"}, {"order": 1, "key": "flags"}]
    group = {"groups": groups, "subgroups": [{"order": 0, "key": "x"}]}
    data = [
        {"hexcode": code, "label": label, "emoji": char, "group": 0, "subgroup": 0, "tags": []}
        for code, (label, char, _) in THINGS.items()
    ]
    data.append({"hexcode": "1F3C1", "label": "chequered flag", "emoji": "🏁", "group": 1, "subgroup": 0})
    short = {f"en/shortcodes/{vendor}.json": {} for vendor in ("emojibase", "github", "iamcal", "joypixels")}
    return {"en/messages.json": group, "en/data.json": data, **short}


def icons_package(named):
    icons = {
        label.replace(" ", "-"): {"body": f'<circle cx="8" cy="8" r="7" fill="{paint}"/>'}
        for label, _, paint in THINGS.values()
    }
    chars = {code.lower(): label.replace(" ", "-") for code, (label, _, _) in THINGS.items()}
    return {"icons.json": {"icons": icons, "width": 16, "height": 16}, "chars.json": chars if named else {}}


def pictures_package():
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGBA", (256, 256), (200, 40, 40, 255)).save(file, "WEBP", lossless=True)
    return {"assets/1f34e.webp": file.getvalue(), "assets/1f697-fe0f.webp": file.getvalue()}


@pytest.fixture
def registry(monkeypatch):
    """Stands for npm: writes tiny packages; counts how often it was asked."""
    asked = []

    def fetch(packages, folder):
        asked.append(1)
        for package in packages:
            content = {"": names_package, "3d": pictures_package}.get(package.style)
            files = content() if content else icons_package(package.style in ("noto", "twemoji", "flat"))
            tarball(folder / package.tarball, files)

    monkeypatch.setattr(emoji, "download_packages", fetch)
    return asked


def test_build_makes_the_folder_once(tmp_path, registry):
    pytest.importorskip("resvg_py")
    out = tmp_path / "data" / "emoji"
    assert emoji.build_emoji_dataset(out, size=32, num_workers=1)
    sprites, pixels = read_sprites(out)
    assert pixels.shape == (7 * 3 + 2, 32, 32, 4) and len(sprites) == 23
    assert {s.concept for s in sprites} == {"red apple", "automobile", "cat face"}  # no flag
    assert {s.style for s in sprites} == {p.style for p in emoji.ICON_PACKAGES}
    car = next(i for i, s in enumerate(sprites) if s.concept == "automobile" and s.style == "firefox")
    assert tuple(pixels[car, 16, 16]) == (0x33, 0x33, 0xDD, 255) and pixels[car, 0, 0, 3] == 0
    assert "car" in sprites[car].names
    assert all(p.spec in (out / "NOTICE").read_text() for p in emoji.ICON_PACKAGES)
    assert not emoji.build_emoji_dataset(out, size=32) and len(registry) == 1
    assert emoji.build_emoji_dataset(out, size=16, num_workers=1) and read_sprites(out)[1].shape[1] == 16
    assert [path.name for path in out.parent.iterdir()] == ["emoji"]


def test_interrupted_build_leaves_nothing_and_the_old_one_stands(tmp_path, registry, monkeypatch):
    out = tmp_path / "emoji"
    out.mkdir()
    (out / "build.json").write_text('{"inputs": "old"}')

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(emoji, "write_sprites", interrupt)
    with pytest.raises(KeyboardInterrupt):
        emoji.build_emoji_dataset(out, size=16, num_workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["emoji"]
    assert (out / "build.json").read_text() == '{"inputs": "old"}'


def test_a_package_that_is_not_the_pinned_one_is_refused(tmp_path):
    file = tmp_path / "x-1.0.tgz"
    file.write_bytes(b"content")
    digest = base64.b64encode(hashlib.sha512(b"content").digest()).decode()
    pinned = emoji.Package("s", "x", "1.0", f"sha512-{digest}", "X", "A", "MIT", "https://example.org")
    emoji.verify_tarball(pinned, file)
    file.write_bytes(b"other")
    with pytest.raises(emoji.DownloadError, match=r"x-1.0.tgz is not the pinned one"):
        emoji.verify_tarball(pinned, file)


def test_without_npm_the_script_says_so_in_one_line(tmp_path):
    out = tmp_path / "emoji"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "build_dataset.py", "--out", out],
        env={"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: npm")
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_what_npm_complains_of_is_passed_on_in_one_line(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code E404' >&2\necho 'npm error 404 Not Found' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(emoji.DownloadError, match=r"^npm pack failed with status 1: code E404 404 Not Found$"):
        emoji.download_packages([emoji.NAMES_PACKAGE], tmp_path)


def test_names_match_best_key_first_and_no_icon_twice():
    def concept(code, name, keys):
        return emoji.EmojiConcept(code, name, (name,), (), "", "", keys)

    face, body = concept("1", "cat face", ("catface", "cat")), concept("2", "cat", ("cat", "cat2"))
    wave = concept("3", "water wave", ("waterwave", "wave"))
    keys = {c.code: list(c.slugs) for c in (face, body, wave)}
    assert emoji.match_icons([face, body], ["cat", "cat-2"], keys, {}) == {"2": "cat"}
    assert emoji.match_icons([face, body], ["cat", "cat_face"], keys, {}) == {"1": "cat_face", "2": "cat"}
    assert emoji.match_icons([face, body], ["cat", "catside"], keys, {"cat face": "cat", "cat": "catside"}) == {
        "1": "cat",
        "2": "catside",
    }


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("woman: red hair", "woman with red hair"),
        ("Christmas tree", "christmas tree"),
        ("woman’s hat", "woman's hat"),
        ("twelve o’clock", "clock at twelve o'clock"),
        ("one-thirty", "clock at one-thirty"),
        ("dizzy", "dizzy star"),
        ("face with tears of joy", "face with tears of joy"),
    ],
)
def test_labels_become_prompts(label, name):
    assert emoji.label_to_prompt(label) == name


def test_aliases_and_tags_are_told_apart_by_a_bar():
    assert emoji.parse_aliases_and_tags("dog | puppy, pup") == (("dog",), ("puppy", "pup"))
    assert emoji.parse_aliases_and_tags("| bunny") == ((), ("bunny",)) and emoji.parse_aliases_and_tags("car") == (
        ("car",),
        (),
    )


def test_flipped_alias_is_the_mirror_image_and_wide_icons_are_centred():
    pytest.importorskip("resvg_py")
    icons = {
        "icons": {"left": {"body": '<path d="M0 0h10v4H0z" fill="red"/>', "width": 20, "height": 8}},
        "aliases": {"right": {"parent": "left", "hFlip": True}},
    }
    left, right = (emoji.render_sprite(emoji.icon_to_svg(icons, name).encode(), 40) for name in ("left", "right"))
    assert np.array_equal(left[:, ::-1], right)
    rows, columns = np.nonzero(left[..., 3])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (12, 19, 0, 19)
