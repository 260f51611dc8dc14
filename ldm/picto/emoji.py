"""The emoji dataset: named sprites of 1,640 concepts in eight openly licensed styles, from npm packages."""

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

from ldm.config import parse_yaml
from ldm.files import atomic_write
from ldm.image_io import contact_sheet
from ldm.installation import install_command
from ldm.picto.scenes import SceneDataset
from ldm.picto.sprites import Sprite, write_sprites

EMOJI_DATASET_VERSION = 1  # increase it when the same inputs give other files


@dataclass(frozen=True)
class Package:
    """A pinned npm package: `style` is what captions call its drawings, `integrity` npm's sha512."""

    style: str
    name: str
    version: str
    integrity: str
    title: str
    author: str
    licence: str
    url: str

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def tarball(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


SOURCES: dict[str, Any] = parse_yaml(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
NAMES_PACKAGE = Package(**SOURCES["names_package"])
ICON_PACKAGES = tuple(Package(**fields) for fields in SOURCES["icon_packages"])


class DownloadError(RuntimeError):
    """A source of the dataset cannot be downloaded, or is not the pinned one."""


def parse_aliases_and_tags(text: str) -> tuple[tuple[str, ...], ...]:
    """`a, b | c` to (a, b), (c,): aliases and tags."""
    names, _, tags = text.partition("|")
    return tuple(tuple(word.strip() for word in part.split(",") if word.strip()) for part in (names, tags))


def download_packages(packages: Iterable[Package], folder: Path) -> None:
    """Download the packages' tarballs with `npm pack` and check each against its pinned sha512.

    Raises DownloadError, in one line, where npm is missing or fails, or a tarball is not the pinned one.
    """
    packages = list(packages)
    command = ["npm", "pack", "--loglevel=error", "--ignore-scripts", "--pack-destination", str(folder)]
    try:
        done = subprocess.run([*command, *(p.spec for p in packages)], capture_output=True, text=True)
    except FileNotFoundError:
        raise DownloadError("npm, which downloads the drawings, is not installed (Debian: apt install npm)") from None
    if done.returncode:
        message = " ".join(line.removeprefix("npm error ") for line in done.stderr.splitlines()[:2])
        raise DownloadError(f"npm pack failed with status {done.returncode}: {message or 'no message'}")
    for package in packages:
        verify_tarball(package, folder / package.tarball)


def verify_tarball(package: Package, tarball: Path) -> None:
    """DownloadError unless the tarball's sha512, in base64, is the package's pinned one."""
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
    """An emoji: its code points without variation selectors, its names, its group, and keys that match icons to it."""

    code: str
    name: str
    names: tuple[str, ...]
    tags: tuple[str, ...]
    group: str
    subgroup: str
    slugs: tuple[str, ...]


def normalize_hexcode(code: str) -> str:
    """A code point sequence in upper case, without variation selector 16."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def slugify(name: str) -> str:
    """Letters and digits only, so that `jack-o-lantern`, `jack_o_lantern` and `jackolantern` are equal."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def label_to_prompt(label: str) -> str:
    """An emojibase label as one would write it in a prompt: `woman: red hair` to `woman with red hair`."""
    name = re.sub("[“”⊛]", "", label.lower().replace("’", "'")).strip()
    name = re.sub(r"^(\w+ o'clock|\w+-thirty)$", r"clock at \1", name)
    name = name.replace("keycap: ", "keycap ").replace(": ", " with ")
    return SOURCES["labels"].get(name, name)


def read_concepts(tarball: Path) -> list[EmojiConcept]:
    """Every emoji of emojibase except flags, skin tones and other components, in its order."""
    messages = read_package_json(tarball, "en/messages.json")
    groups, subgroups = ({g["order"]: g["key"] for g in messages[kind]} for kind in ("groups", "subgroups"))
    shortcodes: dict[str, list[str]] = {}
    for vendor in ("emojibase", "github", "iamcal", "joypixels"):
        for code, names in read_package_json(tarball, f"en/shortcodes/{vendor}.json").items():
            shortcodes.setdefault(code, []).extend([names] if isinstance(names, str) else names)
    concepts = []
    for entry in read_package_json(tarball, "en/data.json"):
        group = groups.get(entry.get("group"), "component")
        if group in ("component", "flags"):
            continue
        code, name = entry["hexcode"], label_to_prompt(entry["label"])
        unicode_name = [unicodedata.name(entry["emoji"][0], "")] if "-" not in normalize_hexcode(code) else []
        keys = dict.fromkeys(map(slugify, [entry["label"], name, *unicode_name, *shortcodes.get(code, [])]))
        aliases, tags = parse_aliases_and_tags(SOURCES["aliases"].get(name, ""))
        subgroup, slugs = subgroups[entry["subgroup"]], tuple(filter(None, keys))
        concepts.append(EmojiConcept(normalize_hexcode(code), name, (name, *aliases), tags, group, subgroup, slugs))
    return concepts


def match_icons(
    concepts: list[EmojiConcept], icons: Iterable[str], slugs: dict[str, list[str]], overrides: dict[str, str]
) -> dict[str, str]:
    """Code -> icon by name: the overrides, then by each concept's earlier keys first, no icon twice."""
    icons = set(icons)
    found = {c.code: overrides[c.name] for c in concepts if overrides.get(c.name) in icons}
    free = {slugify(icon): icon for icon in sorted(icons - set(found.values()))}
    for rank in range(max(map(len, slugs.values()))):
        for concept in concepts:
            keys = slugs[concept.code]
            if concept.code not in found and rank < len(keys) and keys[rank] in free:
                found[concept.code] = free.pop(keys[rank])
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
    """Code -> SVG or WebP file content, for the concepts that are in the package."""
    tarball = folder / package.tarball
    if package.style == "3d":
        return read_webp_files(tarball)
    icons = read_package_json(tarball, "icons.json")
    overrides = SOURCES["firefox_icons"] if package.style == "firefox" else {}
    names = [*icons["icons"], *icons.get("aliases", {})]
    chars = read_char_map(package, folder) or match_icons(concepts, names, slugs, overrides)
    return {c.code: icon_to_svg(icons, chars[c.code]).encode() for c in concepts if c.code in chars}


def read_char_map(package: Package, folder: Path) -> dict[str, str]:
    """Code -> icon, as the package's chars.json says, if it has one."""
    if package.style == "3d":
        return {}
    chars = read_package_json(folder / package.tarball, "chars.json")
    return {normalize_hexcode(code): name for code, name in chars.items()}


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
    """Build `out`: sprites.npy, sprites.jsonl, NOTICE, contact.png and build.json; False where it is up to date.

    `out` is published whole: an interrupted build changes nothing. `size` is the side of a sprite in pixels. Raises
    DownloadError where a package cannot be downloaded.
    """
    inputs = emoji_dataset_key(size)
    if (out / "build.json").is_file() and json.loads((out / "build.json").read_text())["inputs"] == inputs:
        return False
    with tempfile.TemporaryDirectory() as tarballs, atomic_write(out) as draft:
        download_packages((NAMES_PACKAGE, *ICON_PACKAGES), Path(tarballs))
        sprites, files = collect_sprites(Path(tarballs))
        draft.mkdir()
        with ProcessPoolExecutor(num_workers or os.cpu_count()) as pool:
            pixels = pool.map(render_sprite, files, [size] * len(files), chunksize=64)
            write_sprites(draft, sprites, pixels, size)
        (draft / "NOTICE").write_text(make_license_notice(), encoding="utf-8")
        scenes = SceneDataset(draft, size=size)
        images, captions = zip(*(scenes[k] for k in range(100)), strict=True)
        contact_sheet([Image.fromarray(image) for image in images], captions, 10).save(draft / "contact.png")
        (draft / "build.json").write_text(json.dumps({"inputs": inputs, "size": size, "sprites": len(sprites)}))
    return True


def emoji_dataset_key(size: int) -> str:
    """A sha256 of everything that the files depend on: packages, names, renderer, size and the layout's version."""
    try:
        renderer = version("resvg-py")
    except PackageNotFoundError:
        raise DownloadError(
            f"resvg-py, which renders the drawings, is not installed: {install_command('data')}"
        ) from None
    inputs = [EMOJI_DATASET_VERSION, size, renderer, SOURCES]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def collect_sprites(tarballs: Path) -> tuple[list[Sprite], list[bytes]]:
    """Every sprite's record and file content, style by style."""
    concepts = read_concepts(tarballs / NAMES_PACKAGE.tarball)
    keys = {concept.code: list(concept.slugs) for concept in concepts}
    for package in ICON_PACKAGES:
        for code, name in read_char_map(package, tarballs).items():
            if code in keys and slugify(name) not in keys[code]:
                keys[code].append(slugify(name))
    sprites, files = [], []
    for package in ICON_PACKAGES:
        contents = load_icon_files(package, tarballs, concepts, keys)
        for c in concepts:
            if c.code in contents:
                sprites.append(Sprite(c.name, c.code, package.style, c.names, c.tags, c.group, c.subgroup))
                files.append(contents[c.code])
    return sprites, files


def make_license_notice() -> str:
    """The sources of the sprites and their licences."""
    head = "Rendered at one size from these drawings and named after emojibase; scenes also recolour them."
    packages = (*ICON_PACKAGES, NAMES_PACKAGE)
    styles = {p: f", style {p.style}" if p.style else "" for p in packages}
    rows = [f"{p.title} ({p.spec}){styles[p]}: {p.author}. {p.licence}. {p.url}" for p in packages]
    licences = [f"{name}: https://spdx.org/licenses/{name}" for name in sorted({p.licence for p in packages})]
    return "\n".join([head, "", *rows, "", *licences, ""])
