"""What is wrong with a data set and a recipe, told before any training, and what the training will take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ldm.audit.caption_checks import check_captions, check_tokenization
from ldm.audit.duplicates import find_identical_files, find_near_duplicates
from ldm.audit.estimates import (
    check_disk_space,
    check_schedule,
    estimate_disk_usage,
    estimate_memory,
    estimate_schedule,
    summarize_caption_lengths,
)
from ldm.audit.image_checks import check_bucket_fit, check_images
from ldm.audit.latent_checks import check_latents
from ldm.audit.model_config import ModelConfig, load_model_config
from ldm.config import ImageDataConfig, Recipe
from ldm.data.image_dataset import (
    ImageInfo,
    buckets_from_config,
    collect_image_infos,
    source_from_config,
    validation_data_config,
)
from ldm.data.sources import HELD_OUT_PREFIX, NOTICE_KINDS, DatasetIssue, ImageSample

Severity = Literal["error", "warning", "notice"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "notice")
DUPLICATE_KINDS = ("same picture", "other caption", "held out too")  # the same file
WHOLE_DATASET_KINDS = {
    "one caption",
    "few pictures",
    "no new word",
    "buckets",
}  # kinds that say nothing of what is held out
SEVERITY_BY_KIND: Mapping[str, Severity] = {  # by kind; all others are errors
    **dict.fromkeys(("file name", "markup", "mojibake", "says nothing", "cut caption", "one caption"), "warning"),
    **dict.fromkeys((*DUPLICATE_KINDS, "looks the same", "few pictures"), "warning"),
    **dict.fromkeys(("small picture", "extreme shape", "blank picture", "extreme latents"), "warning"),
    **dict.fromkeys(("too few steps", "disk", "no masks"), "warning"),
    **dict.fromkeys(("several lines", "mode", "small bucket", *NOTICE_KINDS), "notice"),
}
NUM_LATENTS_CHECKED = 64  # pictures whose latents are looked at unless all are asked for
AuditProgressCallback = Callable[[str, int, int], None]  # (what, done, of how many)


@dataclass(frozen=True)
class AuditReport:
    """What an audit found, the gravest first, and what it foresees, as JSON values.

    `shown` are the samples that could be read, by key, with the sizes of their pictures.
    """

    issues: tuple[DatasetIssue, ...]
    estimates: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, tuple[ImageSample, ImageInfo]] = field(default_factory=dict)

    def with_severity(self, severity: Severity) -> list[DatasetIssue]:
        """The findings of a severity: with an error, training would fail, or is certain to go wrong."""
        return [fault for fault in self.issues if get_severity(fault) == severity]

    def raise_for_errors(self) -> None:
        """ValueError, in one line, where there is an error: the first, and how many more there are."""
        errors = self.with_severity("error")
        if errors:
            more = f" (and {len(errors) - 1} more: see ldm check)" if len(errors) > 1 else ""
            raise ValueError(f"{errors[0].key}: {errors[0].what}{more}")


def get_severity(issue: DatasetIssue) -> Severity:
    """How grave a finding is."""
    return SEVERITY_BY_KIND.get(issue.kind, "error")


def quick_audit(recipe: Recipe) -> AuditReport:
    """What heads of files and captions tell. ValueError where the recipe's data are no folders."""
    seen = _read_dataset(recipe)
    return _make_report(seen, seen.issues)


def audit_dataset(
    recipe: Recipe, encode_all: bool = False, on_progress: AuditProgressCallback = lambda what, done, total: None
) -> AuditReport:
    """All that `quick_audit` tells, and what only decoded pictures and their latents do; `format_lora_weight` hears how far it is.

    The latents of 64 pictures, spread evenly, are looked at, or of all; what is held out is decoded, not encoded.
    ValueError as for `quick_audit`.
    """
    seen = _read_dataset(recipe)
    found = list(
        check_images(
            seen.samples, recipe.image_data.masks, lambda done: on_progress("decoding", done, len(seen.samples))
        )
    )
    apart = [sample for sample, _ in seen.held_out]
    others = list(check_images(apart, "none", lambda done: on_progress("decoding what is held out", done, len(apart))))
    faults = [*seen.issues, *(fault for scan in (*found, *others) for fault in scan.issues)]
    if recipe.image_data.masks != "none" and seen.samples and not any(scan.has_mask for scan in found):
        faults.append(DatasetIssue("no masks", "data.masks", f"{recipe.image_data.masks!r}, and no picture has one"))
    again = {fault.key for fault in seen.issues if fault.kind in DUPLICATE_KINDS}
    both = zip((*seen.samples, *apart), (*found, *others), strict=True)
    prints = [(sample, scan.fingerprint) for sample, scan in both if scan.fingerprint and sample.key not in again]
    faults += find_near_duplicates([sample for sample, _ in prints], [print for _, print in prints])
    if seen.model_config:
        rows = [row for row, scan in zip(seen.samples_with_info, found, strict=True) if scan.fingerprint]
        rows = rows[:: 1 if encode_all else max(1, len(rows) // NUM_LATENTS_CHECKED)]
        faults += check_latents(
            rows, seen.model_config.load_vae(), lambda done: on_progress("encoding", done, len(rows))
        )
    return _make_report(seen, faults, _make_estimates(seen))


@dataclass(frozen=True)
class _AuditInputs:
    """A recipe's data, as far as heads of files and captions tell; `samples` are those that can be placed.

    `held` are those held out, whose keys say so.
    """

    recipe: Recipe
    model_config: ModelConfig | None
    samples: Sequence[ImageSample]
    image_infos: Sequence[ImageInfo]
    issues: Sequence[DatasetIssue]
    held_out: Sequence[tuple[ImageSample, ImageInfo]] = ()

    @property
    def samples_with_info(self) -> list[tuple[ImageSample, ImageInfo]]:
        return list(zip(self.samples, self.image_infos, strict=True))


def _read_dataset(recipe: Recipe) -> _AuditInputs:
    faults, apart, held = list[DatasetIssue](), list[DatasetIssue](), list[tuple[ImageSample, ImageInfo]]()
    networks = _load_model_config(recipe, faults)
    rows = _read_samples(recipe.image_data, networks, faults)
    if data := validation_data_config(recipe):
        held = [(replace(s, key=HELD_OUT_PREFIX + s.key), look) for s, look in _read_samples(data, networks, apart)]
    faults += [
        fault._replace(key=HELD_OUT_PREFIX + fault.key) for fault in apart if fault.kind not in WHOLE_DATASET_KINDS
    ]
    faults += find_identical_files(
        [sample for sample, _ in (*rows, *held)], [look.digest for _, look in (*rows, *held)]
    )
    return _AuditInputs(recipe, networks, [sample for sample, _ in rows], [look for _, look in rows], faults, held)


def _read_samples(
    data_config: ImageDataConfig, model_config: ModelConfig | None, issues: list[DatasetIssue]
) -> list[tuple[ImageSample, ImageInfo]]:
    """The samples that have a place in a bucket, and what was seen of them."""
    source = source_from_config(data_config)
    issues += [*source.issues, *check_captions(source.samples, data_config.instance_prompt)]
    if model_config:
        issues += check_tokenization(source.samples, model_config.tokenizer, model_config.placeholder_tokens)
    return _assign_buckets(source.samples, data_config, issues)


def _load_model_config(recipe: Recipe, issues: list[DatasetIssue]) -> ModelConfig | None:
    """The recipe's model, None with a fault where it cannot be read, or its latents do not fit the buckets."""
    try:
        networks = load_model_config(recipe)
    except ValueError as error:
        issues.append(DatasetIssue("model", "objective", str(error)))
        return None
    if recipe.image_data.bucket_reso_steps % networks.vae_scale_factor:
        what = f"must be a multiple of {networks.vae_scale_factor}, the pixels a side of a latent"
        issues.append(DatasetIssue("buckets", "data.bucket_reso_steps", what))
        return None
    return networks


def _assign_buckets(
    samples: Sequence[ImageSample], data_config: ImageDataConfig, issues: list[DatasetIssue]
) -> list[tuple[ImageSample, ImageInfo]]:
    try:
        found = collect_image_infos(samples, buckets_from_config(data_config))
    except ValueError as error:
        issues.append(DatasetIssue("buckets", "data.resolution", str(error)))
        return []
    placed = [(sample, look) for sample, look in zip(samples, found, strict=True) if isinstance(look, ImageInfo)]
    issues += [look for look in found if isinstance(look, DatasetIssue)]
    issues += [fault for sample, look in placed for fault in check_bucket_fit(sample, look)]
    return placed


def _make_report(
    inputs: _AuditInputs, issues: Sequence[DatasetIssue], estimates: Mapping[str, Any] | None = None
) -> AuditReport:
    issues = [*issues, *check_schedule(inputs.recipe, inputs.samples, inputs.image_infos)] if inputs.samples else issues
    if inputs.model_config:
        needed = estimate_disk_usage(inputs.recipe, inputs.model_config, inputs.image_infos)["total"]
        issues = [*issues, *check_disk_space(inputs.recipe.output_dir, needed)]
    order = sorted(set(issues), key=lambda fault: (SEVERITIES.index(get_severity(fault)), fault))
    return AuditReport(
        tuple(order), estimates or {}, {row[0].key: row for row in (*inputs.samples_with_info, *inputs.held_out)}
    )


def _make_estimates(inputs: _AuditInputs) -> dict[str, Any]:
    if not inputs.samples:
        return {}
    schedule = estimate_schedule(inputs.recipe, inputs.samples, inputs.image_infos)
    if not inputs.model_config:
        return schedule
    return {
        **schedule,
        "tokens": summarize_caption_lengths(inputs.samples, inputs.model_config),
        "memory": estimate_memory(
            inputs.recipe, inputs.model_config, {look.placement.bucket for look in inputs.image_infos}
        ),
        "disk": estimate_disk_usage(inputs.recipe, inputs.model_config, inputs.image_infos),
    }


def count_issues(report: AuditReport) -> Counter[tuple[Severity, str]]:
    """How many findings there are of each severity and kind, in the report's order."""
    return Counter((get_severity(fault), fault.kind) for fault in report.issues)
