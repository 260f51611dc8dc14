"""`ldm check`: what is wrong with a dataset and a recipe before any training, and what the training will take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ldm.audit.caption_checks import check_captions, check_tokenization
from ldm.audit.duplicates import find_identical_files, find_near_duplicates
from ldm.audit.estimates import (
    ModelConfig,
    check_disk_space,
    check_memory,
    check_schedule,
    estimate_disk_usage,
    estimate_memory,
    estimate_schedule,
    load_model_config,
    summarize_caption_lengths,
)
from ldm.audit.image_checks import check_bucket_fit, check_images, check_latents
from ldm.config import ImageDataConfig, Recipe
from ldm.data.folders import open_image_sources
from ldm.data.image_dataset import ImageInfo, collect_usable_samples, validation_data_config
from ldm.data.sources import (
    DUPLICATE_KINDS,
    HELD_OUT_PREFIX,
    SEVERITIES,
    DatasetIssue,
    ImageSample,
    Severity,
    raise_on_errors,
)

WHOLE_DATASET_KINDS = {
    "one caption",
    "few images",
    "no placeholder token",
    "buckets",
}  # not for held-out data
NUM_LATENTS_CHECKED = 64  # images that are encoded by default
AuditProgressCallback = Callable[[str, int, int], None]  # (what, done, total)
SampleWithInfo = tuple[ImageSample, ImageInfo]


@dataclass(frozen=True)
class AuditReport:
    """The issues of an audit, errors first, its estimates as JSON values, and the readable samples by key."""

    issues: tuple[DatasetIssue, ...]
    estimates: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, SampleWithInfo] = field(default_factory=dict)

    def with_severity(self, severity: Severity) -> list[DatasetIssue]:
        """The issues of a severity."""
        return [issue for issue in self.issues if issue.severity == severity]

    def raise_for_errors(self) -> None:
        """ValueError, in one line, with the first error, if any, and the number of the others."""
        raise_on_errors(self.issues, ": see ldm check")


def quick_audit(recipe: Recipe) -> AuditReport:
    """The issues that captions and image headers tell. ValueError if the recipe's data are not image folders."""
    inputs = _read_dataset(recipe)
    return _make_report(inputs, inputs.issues)


def audit_dataset(
    recipe: Recipe, encode_all: bool = False, on_progress: AuditProgressCallback = lambda what, done, total: None
) -> AuditReport:
    """`quick_audit`, the issues that decoded images and their latents tell, and estimates of what training takes.

    `NUM_LATENTS_CHECKED` images, spread evenly, are encoded, or all; held-out images are decoded only.
    ValueError as for `quick_audit`.
    """
    inputs = _read_dataset(recipe)
    samples, held_out = [sample for sample, _ in inputs.samples], [sample for sample, _ in inputs.held_out]
    masks, progress = recipe.image_data.masks, lambda done: on_progress("decoding", done, len(samples))
    results = list(check_images(samples, masks, progress))
    progress = lambda done: on_progress("decoding held-out images", done, len(held_out))
    all_results = [*results, *check_images(held_out, "none", progress)]
    issues = [*inputs.issues, *(issue for result in all_results for issue in result.issues)]
    if masks != "none" and samples and not any(result.has_mask for result in results):
        issues.append(DatasetIssue("no masks", "data.masks", f"{masks!r}, and no image has one"))
    known = {issue.key for issue in inputs.issues if issue.kind in DUPLICATE_KINDS}
    decoded = [
        (sample, result.fingerprint)
        for sample, result in zip([*samples, *held_out], all_results, strict=True)
        if result.fingerprint and sample.key not in known
    ]
    issues += find_near_duplicates(decoded)
    if inputs.model_config:
        rows = [row for row, result in zip(inputs.samples, results, strict=True) if result.fingerprint]
        rows = rows[:: 1 if encode_all else max(1, len(rows) // NUM_LATENTS_CHECKED)]
        progress = lambda done: on_progress("encoding", done, len(rows))
        issues += check_latents(rows, inputs.model_config.load_vae(), progress)
    return _make_report(inputs, issues, with_estimates=True)


@dataclass(frozen=True)
class _AuditInputs:
    """A recipe's model and samples, those that have a bucket, and the issues found so far."""

    recipe: Recipe
    model_config: ModelConfig | None
    samples: Sequence[SampleWithInfo]
    held_out: Sequence[SampleWithInfo]  # their keys begin with HELD_OUT_PREFIX
    issues: Sequence[DatasetIssue]


def _read_dataset(recipe: Recipe) -> _AuditInputs:
    issues, held_out_issues, held_out = list[DatasetIssue](), list[DatasetIssue](), list[SampleWithInfo]()
    model_config = _load_model_config(recipe, issues)
    samples = _read_samples(recipe.image_data, model_config, issues)
    if data := validation_data_config(recipe):
        pairs = _read_samples(data, model_config, held_out_issues)
        held_out = [(replace(sample, key=HELD_OUT_PREFIX + sample.key), info) for sample, info in pairs]
    for issue in held_out_issues:
        if issue.kind not in WHOLE_DATASET_KINDS:
            issues.append(issue._replace(key=HELD_OUT_PREFIX + issue.key))
    issues += find_identical_files([(sample, info.digest) for sample, info in (*samples, *held_out)])
    return _AuditInputs(recipe, model_config, samples, held_out, issues)


def _read_samples(
    data: ImageDataConfig, model_config: ModelConfig | None, issues: list[DatasetIssue]
) -> list[SampleWithInfo]:
    """The samples that have a bucket."""
    source = open_image_sources(data)
    issues += [*source.issues, *check_captions(source.samples, data.instance_prompt)]
    if model_config:
        issues += check_tokenization(source.samples, model_config.tokenizer, model_config.placeholder_tokens)
    try:
        pairs, wrong = collect_usable_samples(source.samples, data)
    except ValueError as error:
        issues.append(DatasetIssue("buckets", "data.resolution", str(error)))
        return []
    issues += wrong
    issues += [issue for sample, info in pairs for issue in check_bucket_fit(sample, info)]
    return pairs


def _load_model_config(recipe: Recipe, issues: list[DatasetIssue]) -> ModelConfig | None:
    """The recipe's model; None with an issue if it cannot be read, or the bucket sizes do not fit its latents."""
    try:
        model_config = load_model_config(recipe)
    except ValueError as error:
        issues.append(DatasetIssue("model", "objective", str(error)))
        return None
    if recipe.image_data.bucket_reso_steps % model_config.vae_scale_factor:
        what = f"must be a multiple of {model_config.vae_scale_factor}, the VAE's scale factor"
        issues.append(DatasetIssue("buckets", "data.bucket_reso_steps", what))
        return None
    return model_config


def _make_report(inputs: _AuditInputs, issues: Sequence[DatasetIssue], with_estimates: bool = False) -> AuditReport:
    recipe, model_config, pairs = inputs.recipe, inputs.model_config, inputs.samples
    samples, infos = [sample for sample, _ in pairs], [info for _, info in pairs]
    strict, estimates = recipe.image_data.strict, dict[str, Any]()
    issues = [issue._replace(strict=strict) for issue in issues]
    if samples:
        issues += check_schedule(recipe, samples, infos)
        estimates = estimate_schedule(recipe, samples, infos)
    if model_config:
        disk = estimate_disk_usage(recipe, model_config, infos)
        issues += check_disk_space(recipe.output_dir, disk["total"])
        if samples and with_estimates:
            buckets = {info.placement.bucket for info in infos}
            estimates["tokens"] = summarize_caption_lengths(samples, model_config)
            estimates |= {"memory": estimate_memory(recipe, model_config, buckets), "disk": disk}
            issues += check_memory(estimates["memory"]["total"])
    ordered = sorted(set(issues), key=lambda issue: (SEVERITIES.index(issue.severity), issue))
    by_key = {sample.key: (sample, info) for sample, info in (*pairs, *inputs.held_out)}
    return AuditReport(tuple(ordered), estimates if with_estimates else {}, by_key)


def count_issues(report: AuditReport) -> Counter[tuple[Severity, str]]:
    """The number of issues of each severity and kind, in the report's order."""
    return Counter((issue.severity, issue.kind) for issue in report.issues)
