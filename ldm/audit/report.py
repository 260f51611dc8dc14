"""The report of an audit as one self-contained HTML page: each issue with its image, caption, size and path."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from PIL import Image

from ldm.audit.audit import AuditReport, count_issues
from ldm.config import ImageDataConfig
from ldm.data.folders import split_key
from ldm.data.sources import SEVERITIES, BytesReader, DatasetIssue, FileSlice
from ldm.image_io import decode_image

REPORT_THUMBNAIL_SIZE = 160  # pixels
MAX_THUMBNAILS = 1000  # about 6 MB
REPORT_CSS = """
:root { color-scheme: light dark; --line: #8884; --error: #c62828; --warning: #b26a00; --notice: #5b6b7a }
@media (prefers-color-scheme: dark) { :root { --error: #ff8a80; --warning: #ffb74d; --notice: #a7b4c0 } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td { padding: .15rem 1.5rem .15rem 0; vertical-align: top }
td + td { font-variant-numeric: tabular-nums }
nav { display: flex; flex-wrap: wrap; gap: .5rem } label { border: 1px solid var(--line); border-radius: 1rem;
  padding: .15rem .7rem; cursor: pointer } ul { list-style: none; padding: 0 }
li { display: flex; gap: 1rem; border-top: 1px solid var(--line); padding: .7rem 0 } li[hidden] { display: none }
figure { flex: 0 0 160px; margin: 0; min-height: 2rem; text-align: center } img { max-width: 160px;
  background: repeating-conic-gradient(#8883 0 25%, #0000 0 50%) 0 0 / 16px 16px }
div { min-width: 0; overflow-wrap: anywhere } b { margin-right: .5rem } p { margin: .2rem 0 } small { opacity: .75 }
.error b { color: var(--error) } .warning b { color: var(--warning) } .notice b { color: var(--notice) }
"""
REPORT_SCRIPT = """
const boxes = [...document.querySelectorAll('nav input')], rows = [...document.querySelectorAll('li')];
const show = () => { const kinds = new Set(boxes.filter(b => b.checked).map(b => b.value));
  rows.forEach(row => row.hidden = !kinds.has(row.dataset.kind)); };
boxes.forEach(box => box.addEventListener('change', show));
document.querySelectorAll('button').forEach(button => button.addEventListener('click', () => {
  boxes.forEach(box => box.checked = button.value === 'all'); show(); }));
show();
"""


def render_html_report(report: AuditReport, data: ImageDataConfig, title: str) -> str:
    """The page of a report on the images of `data`."""
    counts = ((len(report.with_severity(name)), name) for name in SEVERITIES)
    summary = ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for count, name in counts if count)
    boxes = "".join(
        f'<label class="{severity}"><input type="checkbox" value="{escape(kind)}" checked> <b>{escape(kind)}</b>{count}'
        "</label>"
        for (severity, kind), count in count_issues(report).items()
    )
    rows = "".join(_render_issue(issue, report, data, k < MAX_THUMBNAILS) for k, issue in enumerate(report.issues))
    estimates = format_estimates(report.estimates)
    figures = "".join(f"<tr><td>{escape(name)}<td>{escape(value)}" for name, value in estimates)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{REPORT_CSS}</style><h1>{escape(title)}</h1><p>{summary or 'No issues found'}.<h2>Issues</h2>"
        f'<nav><button value="all">all</button><button value="none">none</button>{boxes}</nav><ul>{rows}</ul>'
        f"<h2>Estimates</h2><table>{figures}</table><script>{REPORT_SCRIPT}</script></html>\n"
    )


def _render_issue(issue: DatasetIssue, report: AuditReport, data: ImageDataConfig, with_thumbnail: bool) -> str:
    folder, name = split_key(issue.key)
    path = data.train_data_dir[folder] / name if folder < len(data.train_data_dir) else None
    path = path if path and path.is_file() else None  # none of a table's row, a tar's member, a setting of the recipe
    sample, info = report.samples.get(issue.key, (None, None))
    read = sample.read_image if sample else FileSlice(path) if path else None
    image = _render_thumbnail(read) if read and with_thumbnail else ""
    size = f"{info.size[0]} x {info.size[1]}" if info else ""
    caption = f"<p><q>{escape(sample.caption)}</q>" if sample else ""
    return (
        f'<li class="{issue.severity}" data-kind="{escape(issue.kind)}"><figure>{image}</figure><div><p>'
        f"<b>{escape(issue.kind)}</b>{escape(issue.what)}{caption}<p><small>{escape(str(path or issue.key))} {size}"
        "</small></div>"
    )


def _render_thumbnail(read: BytesReader) -> str:
    """An <img> that holds a small JPEG; empty if the file cannot be decoded."""
    try:
        image = decode_image(read()).rgb
    except (OSError, ValueError):
        return ""
    image.thumbnail((REPORT_THUMBNAIL_SIZE, REPORT_THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def format_estimates(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of each estimate, for people: "memory: gradients", "1.2 MB"."""
    for name, value in values.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping) and name in ("memory", "disk", "tokens"):
            yield from format_estimates(value, f"{label}: ")
        elif isinstance(value, Mapping):
            yield label, ", ".join(f"{key} {part}" for key, part in value.items())
        elif prefix.startswith(("memory", "disk")):
            yield label, f"{value / 1e6:,.1f} MB"
        elif name.endswith("fraction"):
            yield label, f"{value:.1%}"
        else:
            yield label, f"{value:.4g}" if isinstance(value, float) else f"{value}"
