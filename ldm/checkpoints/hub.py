"""Models from the Hugging Face hub, by `owner/name`: what is read of them, and nothing else, into its cache."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    IncompleteSnapshotError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ldm.checkpoints.directory import INDEX, WEIGHTS, choose_weights, needed
from ldm.checkpoints.lora_save import DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FILE

WORD = r"[A-Za-z0-9_][\w.-]*"
ID = re.compile(rf"({WORD}/{WORD})(?::(.+\.safetensors))?")
TOKEN = "a token of yours is needed, in HF_TOKEN"
EMBEDS_FILE = "learned_embeds.safetensors"  # as diffusers' training script calls a word


def is_id(source: str) -> bool:
    """Is it `owner/name` or `owner/name:file.safetensors`, rather than a path?"""
    match = ID.fullmatch(source)
    return match is not None and not match[1].endswith((".safetensors", ".ckpt", ".pt", ".bin"))


def name(source: str) -> str:
    """What a file or repository is called: its stem, or the repository's name where all such files have that stem."""
    match = ID.fullmatch(source)
    assert match, source
    file = Path(match[2] or DIFFUSERS_FILE)
    return match[1].rpartition("/")[2] if file.name in (DIFFUSERS_FILE, PEFT_FILE, EMBEDS_FILE) else file.stem


class Kind(NamedTuple):
    """Something that repositories hold: its name in errors, and which of their files it is, none where it is not."""

    name: str
    pick: Callable[[Sequence[str], str | None], list[str]]


def _model(names: Sequence[str], variant: str | None) -> list[str]:
    return needed(names, variant) if INDEX in names else []


def _autoencoder(names: Sequence[str], variant: str | None) -> list[str]:
    for folder in ("", "vae/"):
        if f"{folder}config.json" in names:
            own = [name.removeprefix(folder) for name in names if name.startswith(folder)]
            return [f"{folder}{name}" for name in ("config.json", *choose_weights(own, WEIGHTS["vae"], variant))]
    return _only(names)


def _adapter(names: Sequence[str], variant: str | None) -> list[str]:
    if DIFFUSERS_FILE in names:
        return [DIFFUSERS_FILE]
    return [PEFT_FILE, PEFT_CONFIG] if {PEFT_FILE, PEFT_CONFIG} <= {*names} else _only(names)


def _embedding(names: Sequence[str], variant: str | None) -> list[str]:
    return [EMBEDS_FILE] if EMBEDS_FILE in names else _only(names)


def _only(names: Sequence[str]) -> list[str]:
    """The weights where they are one file."""
    found = [name for name in names if name.endswith(".safetensors")]
    return found if len(found) == 1 else []


KINDS = {
    "model": Kind(f"a model (no {INDEX})", _model),
    "vae": Kind("an autoencoder", _autoencoder),
    "adapter": Kind(f"an adapter (no {DIFFUSERS_FILE})", _adapter),
    "embedding": Kind(f"an embedding (no {EMBEDS_FILE})", _embedding),
}


def fetch(
    source: str,
    revision: str | None = None,
    token: str | None = None,
    variant: str | None = None,
    kind: str = "model",
) -> Path:
    """The folder of a repository `owner/name`, or a file of it, in the hub's local cache.

    It is the file of `owner/name:file`, or what in the repository is of that kind of `KINDS`.
    Without the network (HF_HUB_OFFLINE, or none is reached) it is what the cache has. ValueError in one line names the
    repository: no such one, no such revision, gated, not a model, or neither reached nor in the cache.
    """
    match = ID.fullmatch(source)
    assert match, source
    repo_id, file = match.groups()
    with told(source, revision):
        try:
            siblings = HfApi(token=token).model_info(repo_id, revision=revision).siblings or ()
            names, folder = [sibling.rfilename for sibling in siblings], None
        except (HTTPError, OSError) as error:
            if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
                raise
            if file:
                return Path(hf_hub_download(repo_id, file, revision=revision, local_files_only=True))
            folder = _cached(repo_id, revision)
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        if file:
            return Path(hf_hub_download(repo_id, file, revision=revision, token=token))
        if not (picked := KINDS[kind].pick(names, variant)):
            raise ValueError(f"not {KINDS[kind].name}{_offer(repo_id, names)}")
        if folder is None:
            patterns = [glob.escape(name) for name in picked]
            folder = Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns))
        return folder / picked[0] if picked[0].endswith(".safetensors") else folder


def _offer(repo_id: str, names: Sequence[str]) -> str:
    """The files of a repository that can be named."""
    offered = [name for name in names if name.endswith(".safetensors")]
    also = f" or {', '.join(offered[1:])}" if offered[1:] else ""
    return f"; name one of its files, as in {repo_id}:{offered[0]}{also}" if offered else ""


def _cached(repo_id: str, revision: str | None) -> Path:
    """What the cache has of a repository, be it a part: the reader names what is missing."""
    try:
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except IncompleteSnapshotError as error:
        return Path(error.snapshot_path)


@contextmanager
def told(source: str, revision: str | None) -> Iterator[None]:
    """The hub's errors as one line that begins with the repository's name."""
    try:
        yield
    except GatedRepoError:
        said = f"gated: its terms must be accepted on the hub, and {TOKEN}"
    except RepositoryNotFoundError:
        said = f"no such folder or file here, and no such model on the hub; if it is private, {TOKEN}"
    except RevisionNotFoundError:
        said = f"no revision {revision!r}"
    except EntryNotFoundError as error:
        local = isinstance(error, FileNotFoundError)
        said = "not in the local cache, and the hub is not reached" if local else "no such file on the hub"
    except HFValidationError:
        said = "not the name of a model on the hub"
    except (HTTPError, OSError) as error:
        said = f"the hub is not reached ({type(error).__name__})"
    except ValueError as error:
        said = str(error)
    else:
        return
    raise ValueError(f"{source}: {' '.join(said.split())}")
