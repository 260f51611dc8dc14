"""What is wrong with a data set and a recipe, told before any training, and what the training will take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ldm.config import FolderData, Recipe
from ldm.data import footprint, forecast
from ldm.data.captions import caption_faults, reading_faults
from ldm.data.duplicates import near, same_files
from ldm.data.encodings import latent_faults
from ldm.data.networks import Networks, networks_of
from ldm.data.pictures import Surveyed, buckets_of, held_out, source_of, survey
from ldm.data.samples import HELD_OUT, NOTICES, Fault, Sample
from ldm.data.scans import scans, shape_faults

Severity = Literal["error", "warning", "notice"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "notice")
AGAIN = ("same picture", "other caption", "held out too")  # the same file
OF_ALL = {"one caption", "few pictures", "no new word", "buckets"}  # kinds that say nothing of what is held out
SEVERITY: Mapping[str, Severity] = {  # by kind; all others are errors
    **dict.fromkeys(("file name", "markup", "mojibake", "says nothing", "cut caption", "one caption"), "warning"),
    **dict.fromkeys((*AGAIN, "looks the same", "few pictures"), "warning"),
    **dict.fromkeys(("small picture", "extreme shape", "blank picture", "extreme latents"), "warning"),
    **dict.fromkeys(("too few steps", "disk", "no masks"), "warning"),
    **dict.fromkeys(("several lines", "mode", "small bucket", *NOTICES), "notice"),
}
SAMPLED = 64  # pictures whose latents are looked at unless all are asked for
Said = Callable[[str, int, int], None]  # (what, done, of how many)


@dataclass(frozen=True)
class Report:
    """What an audit found, the gravest first, and what it foresees, as JSON values.

    `shown` are the samples that could be read, by key, with the sizes of their pictures.
    """

    faults: tuple[Fault, ...]
    forecast: Mapping[str, Any] = field(default_factory=dict)
    shown: Mapping[str, tuple[Sample, Surveyed]] = field(default_factory=dict)

    def of(self, severity: Severity) -> list[Fault]:
        """The findings of a severity: with an error, training would fail, or is certain to go wrong."""
        return [fault for fault in self.faults if severity_of(fault) == severity]

    def refuse(self) -> None:
        """ValueError, in one line, where there is an error: the first, and how many more there are."""
        errors = self.of("error")
        if errors:
            more = f" (and {len(errors) - 1} more: see ldm check)" if len(errors) > 1 else ""
            raise ValueError(f"{errors[0].key}: {errors[0].what}{more}")


def severity_of(fault: Fault) -> Severity:
    """How grave a finding is."""
    return SEVERITY.get(fault.kind, "error")


def quick(recipe: Recipe) -> Report:
    """What heads of files and captions tell. ValueError where the recipe's data are no folders."""
    seen = _look(recipe)
    return _report(seen, seen.faults)


def audit(recipe: Recipe, all_latents: bool = False, said: Said = lambda what, done, total: None) -> Report:
    """All that `quick` tells, and what only decoded pictures and their latents do; `said` hears how far it is.

    The latents of 64 pictures, spread evenly, are looked at, or of all; what is held out is decoded, not encoded.
    ValueError as for `quick`.
    """
    seen = _look(recipe)
    found = list(scans(seen.samples, recipe.folder.masks, lambda done: said("decoding", done, len(seen.samples))))
    apart = [sample for sample, _ in seen.held]
    others = list(scans(apart, "none", lambda done: said("decoding what is held out", done, len(apart))))
    faults = [*seen.faults, *(fault for scan in (*found, *others) for fault in scan.faults)]
    if recipe.folder.masks != "none" and seen.samples and not any(scan.masked for scan in found):
        faults.append(Fault("no masks", "data.masks", f"{recipe.folder.masks!r}, and no picture has one"))
    again = {fault.key for fault in seen.faults if fault.kind in AGAIN}
    both = zip((*seen.samples, *apart), (*found, *others), strict=True)
    prints = [(sample, scan.print) for sample, scan in both if scan.print and sample.key not in again]
    faults += near([sample for sample, _ in prints], [print for _, print in prints])
    if seen.networks:
        rows = [row for row, scan in zip(seen.rows, found, strict=True) if scan.print]
        rows = rows[:: 1 if all_latents else max(1, len(rows) // SAMPLED)]
        faults += latent_faults(rows, seen.networks.load_vae(), lambda done: said("encoding", done, len(rows)))
    return _report(seen, faults, _foreseen(seen))


@dataclass(frozen=True)
class _Seen:
    """A recipe's data, as far as heads of files and captions tell; `samples` are those that can be placed.

    `held` are those held out, whose keys say so.
    """

    recipe: Recipe
    networks: Networks | None
    samples: Sequence[Sample]
    looks: Sequence[Surveyed]
    faults: Sequence[Fault]
    held: Sequence[tuple[Sample, Surveyed]] = ()

    @property
    def rows(self) -> list[tuple[Sample, Surveyed]]:
        return list(zip(self.samples, self.looks, strict=True))


def _look(recipe: Recipe) -> _Seen:
    faults, apart, held = list[Fault](), list[Fault](), list[tuple[Sample, Surveyed]]()
    networks = _networks(recipe, faults)
    rows = _read(recipe.folder, networks, faults)
    if data := held_out(recipe):
        held = [(replace(s, key=HELD_OUT + s.key), look) for s, look in _read(data, networks, apart)]
    faults += [fault._replace(key=HELD_OUT + fault.key) for fault in apart if fault.kind not in OF_ALL]
    faults += same_files([sample for sample, _ in (*rows, *held)], [look.digest for _, look in (*rows, *held)])
    return _Seen(recipe, networks, [sample for sample, _ in rows], [look for _, look in rows], faults, held)


def _read(data: FolderData, networks: Networks | None, faults: list[Fault]) -> list[tuple[Sample, Surveyed]]:
    """The samples that have a place in a bucket, and what was seen of them."""
    source = source_of(data)
    faults += [*source.faults, *caption_faults(source.samples, data.instance_prompt)]
    if networks:
        faults += reading_faults(source.samples, networks.tokenizer, networks.words)
    return _placed(source.samples, data, faults)


def _networks(recipe: Recipe, faults: list[Fault]) -> Networks | None:
    """The recipe's model, None with a fault where it cannot be read, or its latents do not fit the buckets."""
    try:
        networks = networks_of(recipe)
    except ValueError as error:
        faults.append(Fault("model", "objective", str(error)))
        return None
    if recipe.folder.bucket_reso_steps % networks.downscale:
        what = f"must be a multiple of {networks.downscale}, the pixels a side of a latent"
        faults.append(Fault("buckets", "data.bucket_reso_steps", what))
        return None
    return networks


def _placed(samples: Sequence[Sample], data: FolderData, faults: list[Fault]) -> list[tuple[Sample, Surveyed]]:
    try:
        found = survey(samples, buckets_of(data))
    except ValueError as error:
        faults.append(Fault("buckets", "data.resolution", str(error)))
        return []
    placed = [(sample, look) for sample, look in zip(samples, found, strict=True) if isinstance(look, Surveyed)]
    faults += [look for look in found if isinstance(look, Fault)]
    faults += [fault for sample, look in placed for fault in shape_faults(sample, look)]
    return placed


def _report(seen: _Seen, faults: Sequence[Fault], foreseen: Mapping[str, Any] | None = None) -> Report:
    faults = [*faults, *forecast.course(seen.recipe, seen.samples, seen.looks)] if seen.samples else faults
    if seen.networks:
        needed = footprint.disk(seen.recipe, seen.networks, seen.looks)["total"]
        faults = [*faults, *footprint.room(seen.recipe.output_dir, needed)]
    order = sorted(set(faults), key=lambda fault: (SEVERITIES.index(severity_of(fault)), fault))
    return Report(tuple(order), foreseen or {}, {row[0].key: row for row in (*seen.rows, *seen.held)})


def _foreseen(seen: _Seen) -> dict[str, Any]:
    if not seen.samples:
        return {}
    schedule = forecast.schedule(seen.recipe, seen.samples, seen.looks)
    if not seen.networks:
        return schedule
    return {
        **schedule,
        "tokens": forecast.tokens(seen.samples, seen.networks),
        "memory": footprint.memory(seen.recipe, seen.networks, {look.placement.bucket for look in seen.looks}),
        "disk": footprint.disk(seen.recipe, seen.networks, seen.looks),
    }


def counts(report: Report) -> Counter[tuple[Severity, str]]:
    """How many findings there are of each severity and kind, in the report's order."""
    return Counter((severity_of(fault), fault.kind) for fault in report.faults)
