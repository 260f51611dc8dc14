"""Eight openly licensed drawings of the same 1,640 things: npm packages in, a folder of named sprites out."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.files import atomic_write
from ldm.image_io import contact_sheet
from ldm.installation import install_command
from ldm.picto.emoji_sources import (
    CONCEPT_ALIASES,
    EMOJIBASE,
    FIREFOX_ICON_OVERRIDES,
    ICON_PACKAGES,
    LABEL_OVERRIDES,
    Package,
)
from ldm.picto.scenes import SceneDataset
from ldm.picto.sprites import Sprite, write_sprites

EMOJI_DATASET_VERSION = 1  # raise it when the same inputs give other files


class DownloadError(RuntimeError):
    """Something that the data set is made with could not be had, or is not the one that was pinned."""


def parse_pairs(text: str) -> dict[str, str]:
    """`left: right` pairs, between semicolons or on lines of their own."""
    return {entry.split(": ")[0]: entry.split(": ")[1] for entry in re.split("; |\n", text.strip())}


def parse_aliases_and_tags(text: str) -> tuple[tuple[str, ...], ...]:
    """`a, b | c` to (a, b), (c,): aliases and tags."""
    names, _, tags = text.partition("|")
    return tuple(tuple(word.strip() for word in part.split(",") if word.strip()) for part in (names, tags))


def download_packages(packages: Iterable[Package], folder: Path) -> None:
    """Download the packages' tarballs with `npm pack` and check each against its pinned sha512.

    Raises FetchError, in one line, where npm is missing or fails, or a tarball is not the pinned one.
    """
    packages = list(packages)
    command = ["npm", "pack", "--loglevel=error", "--ignore-scripts", "--pack-destination", str(folder)]
    try:
        done = subprocess.run([*command, *(p.spec for p in packages)], capture_output=True, text=True)
    except FileNotFoundError:
        raise DownloadError("npm, which fetches the drawings, is not installed (Debian: apt install npm)") from None
    if done.returncode:
        said = " ".join(line.removeprefix("npm error ") for line in done.stderr.splitlines()[:2])
        raise DownloadError(f"npm pack failed with status {done.returncode}: {said or 'no message'}")
    for package in packages:
        verify_tarball(package, folder / package.tarball)


def verify_tarball(package: Package, tarball: Path) -> None:
    """Raise FetchError unless the tarball's sha512, in base64, is the package's pinned one."""
    if not tarball.is_file():
        raise DownloadError(f"npm pack left no {tarball.name} for {package.spec}")
    digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if f"sha512-{digest}" != package.integrity:
        raise DownloadError(f"{tarball.name} is not the pinned one: sha512-{digest}")


def read_package_json(tarball: Path, member: str) -> Any:
    """One JSON file of an npm package."""
    with tarfile.open(tarball) as archive:
        file = archive.extractfile(f"package/{member}")
        assert file is not None, f"{tarball.name}: {member} is a folder"
        return json.load(file)


@dataclass(frozen=True)
class EmojiConcept:
    """One emoji: its code point sequence without variation selectors, its names, and where it belongs."""

    code: str
    name: str
    names: tuple[str, ...]
    tags: tuple[str, ...]
    group: str
    subgroup: str
    slugs: tuple[str, ...]


def normalize_hexcode(code: str) -> str:
    """A code point sequence in the one spelling used here: upper case, no variation selector 16."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def slugify(name: str) -> str:
    """Letters and digits only, so that `jack-o-lantern`, `jack_o_lantern` and `jackolantern` meet."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def label_to_prompt(label: str) -> str:
    """An emojibase label as one would write it in a prompt: `woman: red hair` to `woman with red hair`."""
    name = re.sub("[“”⊛]", "", label.lower().replace("’", "'")).strip()
    name = re.sub(r"^(\w+ o'clock|\w+-thirty)$", r"clock at \1", name)
    name = name.replace("keycap: ", "keycap ").replace(": ", " with ")
    return parse_pairs(LABEL_OVERRIDES).get(name, name)


def read_concepts(tarball: Path) -> list[EmojiConcept]:
    """Every emoji of emojibase but flags, skin tones and other components, in its order."""
    messages = read_package_json(tarball, "en/messages.json")
    groups, subgroups = ({g["order"]: g["key"] for g in messages[kind]} for kind in ("groups", "subgroups"))
    short: dict[str, list[str]] = {}
    for vendor in ("emojibase", "github", "iamcal", "joypixels"):
        for code, words in read_package_json(tarball, f"en/shortcodes/{vendor}.json").items():
            short.setdefault(code, []).extend([words] if isinstance(words, str) else words)
    concepts, also = [], parse_pairs(CONCEPT_ALIASES)
    for entry in read_package_json(tarball, "en/data.json"):
        group = groups.get(entry.get("group"), "component")
        if group in ("component", "flags"):
            continue
        code, name = entry["hexcode"], label_to_prompt(entry["label"])
        unicode_name = [unicodedata.name(entry["emoji"][0], "")] if "-" not in normalize_hexcode(code) else []
        keys = dict.fromkeys(map(slugify, [entry["label"], name, *unicode_name, *short.get(code, [])]))
        aliases, tags = parse_aliases_and_tags(also.get(name, ""))
        where = (group, subgroups[entry["subgroup"]])
        concepts.append(
            EmojiConcept(normalize_hexcode(code), name, (name, *aliases), tags, *where, tuple(filter(None, keys)))
        )
    return concepts


def match_icons(
    concepts: list[EmojiConcept], icons: Iterable[str], slugs: dict[str, list[str]], overrides: dict[str, str]
) -> dict[str, str]:
    """Code -> icon by name: what is told first, then a concept's better keys, no icon twice."""
    icons = set(icons)
    found = {c.code: overrides[c.name] for c in concepts if overrides.get(c.name) in icons}
    free = {slugify(icon): icon for icon in sorted(icons - set(found.values()))}
    for rank in range(max(map(len, slugs.values()))):
        for concept in concepts:
            tried = slugs[concept.code]
            if concept.code not in found and rank < len(tried) and tried[rank] in free:
                found[concept.code] = free.pop(tried[rank])
    return found


def icon_to_svg(icon_set: dict[str, Any], name: str) -> str:
    """The SVG text of an iconify icon or alias, centred in a square view box."""
    icon, flips = {**icon_set["icons"], **icon_set.get("aliases", {})}[name], [1, 1]
    while "parent" in icon:
        flips = [flips[0] * (-1) ** icon.get("hFlip", False), flips[1] * (-1) ** icon.get("vFlip", False)]
        parent = icon["parent"]
        icon = icon_set["icons"].get(parent) or icon_set["aliases"][parent]
    w, h = icon.get("width", icon_set.get("width", 16)), icon.get("height", icon_set.get("height", 16))
    x, y, side = icon.get("left", 0) + w / 2, icon.get("top", 0) + h / 2, max(w, h)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{-side / 2} {-side / 2} {side} {side}">'
        f'<g transform="scale({flips[0]} {flips[1]}) translate({-x} {-y})">{icon["body"]}</g></svg>'
    )


def load_icon_files(
    package: Package, folder: Path, concepts: list[EmojiConcept], slugs: dict[str, list[str]]
) -> dict[str, bytes]:
    """Code -> SVG or WebP file content, for the concepts that the package draws."""
    tarball = folder / package.tarball
    if package.style == "3d":
        return read_webp_files(tarball)
    icons = read_package_json(tarball, "icons.json")
    told = parse_pairs(FIREFOX_ICON_OVERRIDES) if package.style == "firefox" else {}
    chars = read_char_map(package, folder) or match_icons(
        concepts, [*icons["icons"], *icons.get("aliases", {})], slugs, told
    )
    return {c.code: icon_to_svg(icons, chars[c.code]).encode() for c in concepts if c.code in chars}


def read_char_map(package: Package, folder: Path) -> dict[str, str]:
    """Code -> icon, where the package tells."""
    if package.style == "3d":
        return {}
    return {
        normalize_hexcode(code): name
        for code, name in read_package_json(folder / package.tarball, "chars.json").items()
    }


def read_webp_files(tarball: Path) -> dict[str, bytes]:
    """Code -> content of the package's `assets/CODE.webp`."""
    with tarfile.open(tarball) as archive:
        files = ((m, archive.extractfile(m)) for m in archive if m.name.endswith(".webp"))
        return {normalize_hexcode(Path(m.name).stem): file.read() for m, file in files if file is not None}


def render_sprite(content: bytes, size: int) -> np.ndarray:
    """An SVG or WebP file to RGBA with straight alpha, uint8 [size, size, 4]."""
    if content.startswith(b"<svg"):
        import resvg_py

        content = resvg_py.svg_to_bytes(content.decode(), width=size, height=size, skip_system_fonts=True)
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    return np.asarray(image if image.size == (size, size) else image.resize((size, size), Image.Resampling.LANCZOS))


def build_emoji_dataset(out: Path, size: int = 128, num_workers: int | None = None) -> bool:
    """Make `out`: sprites.npy, sprites.jsonl, NOTICE, contact.png and build.json; False where it is there.

    `out` is published whole: an interrupted build leaves what was there before.
    `size` is the sprites' side in pixels. Raises FetchError where a package cannot be had.
    """
    inputs = emoji_dataset_key(size)
    if (out / "build.json").is_file() and json.loads((out / "build.json").read_text())["inputs"] == inputs:
        return False
    with tempfile.TemporaryDirectory() as tarballs, atomic_write(out) as made:
        download_packages((EMOJIBASE, *ICON_PACKAGES), Path(tarballs))
        sprites, files = collect_sprites(Path(tarballs))
        made.mkdir()
        with ProcessPoolExecutor(num_workers or os.cpu_count()) as pool:
            pixels = pool.map(render_sprite, files, [size] * len(files), chunksize=64)
            write_sprites(made, sprites, pixels, size)
        (made / "NOTICE").write_text(make_license_notice(), encoding="utf-8")
        scenes = SceneDataset(made, size=size)
        images, captions = zip(*(scenes[k] for k in range(100)), strict=True)
        contact_sheet([Image.fromarray(image) for image in images], captions, 10).save(made / "contact.png")
        (made / "build.json").write_text(json.dumps({"inputs": inputs, "size": size, "sprites": len(sprites)}))
    return True


def emoji_dataset_key(size: int) -> str:
    """A sha256 of all that the files depend on: packages, names, renderer, size and the layout's version."""
    try:
        renderer = version("resvg-py")
    except PackageNotFoundError:
        raise DownloadError(
            f"resvg-py, which renders the drawings, is not installed: {install_command('data')}"
        ) from None
    inputs = (
        EMOJI_DATASET_VERSION,
        size,
        renderer,
        EMOJIBASE,
        ICON_PACKAGES,
        LABEL_OVERRIDES,
        CONCEPT_ALIASES,
        FIREFOX_ICON_OVERRIDES,
    )
    return hashlib.sha256(repr(inputs).encode()).hexdigest()


def collect_sprites(tarballs: Path) -> tuple[list[Sprite], list[bytes]]:
    """Every sprite's record and file content, style by style."""
    concepts = read_concepts(tarballs / EMOJIBASE.tarball)
    keys = {concept.code: list(concept.slugs) for concept in concepts}
    for package in ICON_PACKAGES:
        for code, name in read_char_map(package, tarballs).items():
            if code in keys and slugify(name) not in keys[code]:
                keys[code].append(slugify(name))
    sprites, files = [], []
    for package in ICON_PACKAGES:
        drawn = load_icon_files(package, tarballs, concepts, keys)
        for c in concepts:
            if c.code in drawn:
                sprites.append(Sprite(c.name, c.code, package.style, c.names, c.tags, c.group, c.subgroup))
                files.append(drawn[c.code])
    return sprites, files


def make_license_notice() -> str:
    """What the sprites were made from, under which licences."""
    head = "Rendered at one size from these drawings and named after emojibase; scenes also recolour them."
    rows = [f"{p.title} ({p.spec}), style {p.style}: {p.author}. {p.licence}. {p.url}" for p in ICON_PACKAGES]
    names = f"{EMOJIBASE.title} ({EMOJIBASE.spec}): {EMOJIBASE.author}. {EMOJIBASE.licence}. {EMOJIBASE.url}"
    licences = sorted({p.licence for p in (EMOJIBASE, *ICON_PACKAGES)})
    return "\n".join(
        [head, "", *rows, names, "", *(f"{name}: https://spdx.org/licenses/{name}" for name in licences), ""]
    )
