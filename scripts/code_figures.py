"""Figures of the code: its size, its names, its import graph, and the files that a reader opens on four journeys.

    python scripts/code_figures.py [CHECKOUT] [--json]

For comparison before and after a refactoring; what that may rename stands in the tables at the top alone. An import
counts wherever it stands, inside functions and under TYPE_CHECKING too, but for those of `ldm/__init__.py`.

A journey is traced in a fresh process, on a CPU, with the shipped model. A file is on it if a function, lambda or
comprehension of it runs, but not what an import runs: modules, class bodies, and the functions that they call. A span
is all that is called, in any thread, from the first call of one function to the first return of another.

    prompt -> pixels  `pipe(prompt)` of a loaded pipeline
    sample -> loss    span from the task's batch to its loss in `ldm train`: a LoRA, latents cached
    item -> manifest  span from the first lease to the manifest's row in `ldm batch` of one prompt, the driver's files
                      included, less those of prompt -> pixels
    key -> module     span from opening a file of Stable Diffusion 1 in the original (LDM) layout to its filled
                      networks, less nn/, which builds them

A climb is a pair of files (caller -> callee) in that `ldm train` where a function of a lower floor of DESIGN.md calls
one of a higher floor, directly or through libraries: a callback, or a generator that it resumes. "By hand" is what a
reader counted before the refactoring.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import json
import multiprocessing
import os
import re
import shlex
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.util import resolve_name
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

SPANS = {  # "file:qualified name" of the functions that begin and end the span of a run; spellings old|new
    "train": (r"train/\w+\.py:\w+Task\.(batch|make_batch)", r"train/\w+\.py:\w+Task\.(loss|compute_loss)"),
    "batch": (r"jobs/leases\.py:\w+\.acquire", r"jobs/manifest\.py:(append|append_\w+)"),
    "load": (r"checkpoints/tensors\.py:open_\w+", r"checkpoints/networks\.py:(fill|load_weights)"),
}
SINGLE_FILE = (
    ["FAMILIES"],
    ["to_single", "convert_to_original"],
    ["skeleton", "build_meta_state_dicts"],
)  # each the first that exists
FLOORS = """ground | diffusion nn | checkpoints | adapters data | pipeline
| train jobs evaluate convert analysis compat | audit serve picto | commands | cli | main"""  # DESIGN.md, section 2
LEVEL = {room: level for level, rooms in enumerate(FLOORS.split("|")) for room in rooms.split()}
FLAT = dict.fromkeys(("pipeline.py", "request.py", "scheduler.py", "texts.py", "editing.py"), "pipeline")
FLAT |= {
    "measure.py": "analysis",
    "compat.py": "compat",
    "cli.py": "cli",
}  # rooms of files directly in ldm/; the others are the ground
CORE, SPLIT_OFF = ("ground", "diffusion", "nn", "checkpoints", "pipeline"), ("adapters", "analysis", "convert")
COMMANDS = "generate 'a red apple' --steps 2 --out images", "train recipe.yaml", "batch prompts.txt --steps 2 --out job"
RECIPE = """{objective: {kind: tune, method: lora}, output_dir: runs/lora, max_train_steps: 2, train_batch_size: 2,
data: {train_data_dir: data, center_crop: true, resolution: 32, min_bucket_reso: 32, bucket_reso_steps: 32},
learning_rate: 1e-3, report_to: [], dataloader_num_workers: 0}"""
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Figure(NamedTuple):
    """A number, how it is counted, and what was counted where that is a list."""

    name: str
    value: float
    how: str
    items: Sequence[str] = ()


def room(path: str) -> str:
    """The room of a file below ldm/."""
    return path.split("/")[0] if "/" in path else FLAT.get(path, "ground")


def size_figures(texts: Mapping[str, str], trees: Mapping[str, ast.Module]) -> Iterator[Figure]:
    """Files, lines, and lengths of functions."""
    lines = {path: text.count("\n") for path, text in texts.items()}
    core = sum(
        n
        for path, n in lines.items()
        if room(path) in CORE or path in FLAT.keys() - {"cli.py", "compat.py", "__main__.py"}
    )
    apart = sum(n for path, n in lines.items() if room(path) in SPLIT_OFF and path not in FLAT)
    kinds = ast.FunctionDef, ast.AsyncFunctionDef
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, kinds)]
    lengths = sorted((node.end_lineno or 0) - node.lineno + 1 for node in functions)
    yield Figure("Python files", len(lines), "in ldm/")
    yield Figure("lines", sum(lines.values()), "as `wc -l` counts them")
    yield Figure("lines of the core", core, f"{', '.join(CORE)}; the ground is all files directly in ldm/ but cli.py")
    yield Figure("lines of the wider core", core + apart, f"with {', '.join(SPLIT_OFF)}, that were parts of it")
    yield Figure("functions", len(lengths), "methods and nested ones too")
    yield Figure("median length", median(lengths), "lines of a function, from `def` to its end")
    yield Figure("90th percentile", lengths[len(lengths) * 9 // 10], "of these lengths")
    yield Figure("longest function", lengths[-1], "of these lengths")


def name_figures(trees: Mapping[str, ast.Module]) -> Iterator[Figure]:
    """Public names that several modules define, and names of one word."""
    homes, all_homes = defaultdict(set), defaultdict(set)
    names, private = [], []
    for path, tree in trees.items():
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for name in (target.id for target in targets if isinstance(target, ast.Name)):
                all_homes[name].add(path)
            if isinstance(node, Definition):
                homes[node.name].add(path)
                all_homes[node.name].add(path)
        for body in (tree.body, *(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))):
            own = [node for node in body if isinstance(node, Definition)]
            names += [node.name for node in own if not node.name.startswith("__")]
            private += [f"{path}: {node.name}" for node in own if re.fullmatch("_[a-z0-9]+", node.name)]
    for label, table, how in (
        ("public names defined twice", homes, "top-level functions and classes of more than one module"),
        ("the same with constants", all_homes, "and top-level constants and aliases"),
    ):
        twice = [f"{name}: {', '.join(sorted(at))}" for name, at in table.items() if name[0] != "_" and len(at) > 1]
        yield Figure(label, len(twice), how, sorted(twice))
    yield Figure("private functions of one word", len(private), "`_[a-z0-9]+`, top-level or methods", private)
    share = sum(re.fullmatch("_?[A-Za-z][a-z0-9]*", name) is not None for name in names) / len(names)
    yield Figure("share of one-word names", round(share, 3), f"of {len(names)} functions, methods and classes")


def graph_figures(trees: Mapping[str, ast.Module]) -> Iterator[Figure]:
    """Circles (strongly connected components of more than one file), and imports against the floors."""
    paths = [path for path in trees if path != "__init__.py"]
    modules = {f"ldm.{path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}": path for path in paths}
    graph: dict[str, set[str]] = {}
    for path in paths:
        names, package = [], ".".join(["ldm", *path.split("/")[:-1]])
        for node in ast.walk(trees[path]):
            if isinstance(node, ast.ImportFrom):
                base = resolve_name("." * node.level + (node.module or ""), package)
                names += [f"{base}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
        nearest = (name if name in modules else name.rpartition(".")[0] for name in names)
        graph[path] = {modules[name] for name in nearest if name in modules} - {path}
    reached = {path: {*found} for path, found in graph.items()}
    for through in paths:  # Warshall's transitive closure
        for path in paths:
            reached[path] |= reached[through] if through in reached[path] else set()
    circles = {", ".join(b for b in paths if a in reached[b] and b in reached[a]) for a in paths} - {""}
    yield Figure("circles", len(circles), "groups of files that import one another", sorted(circles))
    edges = [(f"{a} -> {b}", room(a), room(b)) for a in paths for b in sorted(graph[a])]
    upward = [edge for edge, a, b in edges if LEVEL[a] < LEVEL[b]]
    aside = [edge for edge, a, b in edges if LEVEL[a] == LEVEL[b] and a != b]
    absent = ", ".join(name for name in LEVEL if name not in map(room, paths)) or "none"
    yield Figure("imports upward", len(upward), f"file to file, by the floors of DESIGN.md; n/a of {absent}", upward)
    yield Figure("imports aside", len(aside), "from one room of a floor to another", aside)


def trace(name: str, root: Path) -> dict[str, list[str]]:
    """Files of a run (see `prepare`) as a whole and of its span, and its climbs; the process has to be a fresh one."""
    sys.path.insert(0, str(root))
    package, thread, phase = f"{root / 'ldm'}/", threading.local(), "before"
    start, end = map(re.compile, SPANS.get(name.split()[0], (".*", ".*")))
    found: dict[str, set[str]] = {"whole": set(), "span": set(), "climbs": set()}

    def profile(frame: Any, event: str, arg: object) -> None:
        nonlocal phase
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(package):
            return
        path, stack = code.co_filename.removeprefix(package), thread.__dict__.setdefault("stack", [])
        place = f"{path}:{code.co_qualname}"
        if event == "return":
            stack.pop()
            phase = "after" if phase == "within" and end.fullmatch(place) else phase
            return
        caller = stack[-1] if stack else path
        # "" is an import, whose code and class bodies' code is not "optimized", and all that it calls
        stack.append(path if caller and code.co_flags & inspect.CO_OPTIMIZED else "")
        if stack[-1]:
            phase = "within" if phase == "before" and start.fullmatch(place) else phase
            found["whole"].add(path)
            found["span"] |= {path} if phase == "within" else set()
            found["climbs"] |= {f"{caller} -> {path}"} if LEVEL[room(caller)] < LEVEL[room(path)] else set()

    with TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(sys.stderr):
        run = prepare(name)
        threading.setprofile(profile)
        sys.setprofile(profile)
        try:
            run()
        except SystemExit as status:
            if status.code:
                raise
        sys.setprofile(None)
    if phase != "after":
        raise ValueError(f"SPANS: {name!r} calls nothing like {start.pattern} and then {end.pattern}")
    return {key: sorted(values) for key, values in found.items()}


def prepare(name: str) -> Callable[[], object]:
    """What is traced, once its inputs are in the working folder: a call of a pipeline, its loading, or a command."""
    from PIL import Image

    from ldm import Pipeline
    from ldm.cli import main

    if name == "call":
        pipe = Pipeline.from_pretrained()
        return lambda: pipe("a red apple", num_inference_steps=2)
    if name == "load":
        write_single_file(path := Path("sd1.safetensors"))
        return lambda: Pipeline.from_pretrained(path, dtype="bfloat16", prediction="eps")
    Path("prompts.txt").write_text("a red apple\n")
    Path("recipe.yaml").write_text(RECIPE)
    Path("data").mkdir()
    for k in range(2):
        Image.effect_noise((32, 32), 40 + k).convert("RGB").save(f"data/{k}.png")
        Path(f"data/{k}.txt").write_text("a red apple")
    sys.argv = ["ldm", *shlex.split(name)]
    return main


def write_single_file(path: Path) -> None:
    """Stable Diffusion 1 in the original layout, of zeros, which take no place on the disk."""
    known = {k: v for room in ("families", "keys") for k, v in vars(import_module(f"ldm.checkpoints.{room}")).items()}
    families, to_single, skeleton = (next(known[name] for name in names if name in known) for names in SINGLE_FILE)
    header, end = {}, 0
    for name, tensor in to_single(skeleton(families["sd1"]), families["sd1"]).items():
        start, end = end, end + tensor.numel()
        header[name] = {"dtype": "F8_E4M3", "shape": list(tensor.shape), "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


def journey_figures(root: Path) -> Iterator[Figure]:
    """Files on the four journeys and on the whole runs, and climbs."""
    runs = ("call", "load", *COMMANDS)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        call, load, generate, train, batch = pool.map(trace, runs, [root] * len(runs))
    image, key = {*call["whole"]}, [path for path in load["span"] if room(path) != "nn"]
    for name, how, files in (
        ("prompt -> pixels", "a loaded pipeline's call", call["whole"]),
        ("`ldm generate`", "with the command and loading (by hand 34)", generate["whole"]),
        ("sample -> loss", "a LoRA's step, batch to loss (by hand 22)", train["span"]),
        ("`ldm train`", "with check, loading and export", train["whole"]),
        ("item -> manifest", "lease to row, less prompt -> pixels (by hand 17)", {*batch["span"]} - image),
        ("`ldm batch`", "less prompt -> pixels", {*batch["whole"]} - image),
        ("key -> module", "header to filled networks, less nn/ (by hand 12)", key),
        ("`from_pretrained(file)`", "the pipeline too", load["whole"]),
        ("climbs", "pairs of files, from a lower floor to a higher, in `ldm train` (by hand 7)", train["climbs"]),
    ):
        yield Figure(name, len(files), how, sorted(files))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?", default=Path(__file__).parents[1])
    parser.add_argument("--json", action="store_true", help="the lists of what is counted, too")
    args = parser.parse_args()
    root = args.checkout.resolve()
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    texts = {path.relative_to(root / "ldm").as_posix(): path.read_text() for path in sorted(root.glob("ldm/**/*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    figures = [*size_figures(texts, trees), *name_figures(trees), *graph_figures(trees), *journey_figures(root)]
    if args.json:
        return print(json.dumps({figure.name: figure._asdict() for figure in figures}, indent=2))
    print("| figure | value | how |\n|---|---|---|")
    for name, value, how, _ in figures:
        print(f"| {name} | {value} | {how} |")


if __name__ == "__main__":
    main()
