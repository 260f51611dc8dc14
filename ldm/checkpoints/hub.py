"""Models from the Hugging Face hub, by `owner/name`: what is read of them, and nothing else, into its cache."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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

from ldm.checkpoints.directory import INDEX, needed

WORD = r"[A-Za-z0-9_][\w.-]*"
ID = re.compile(rf"({WORD}/{WORD})(?::(.+\.safetensors))?")
TOKEN = "a token of yours is needed, by --token or HF_TOKEN"


def is_id(source: str) -> bool:
    """Is it `owner/name` or `owner/name:file.safetensors`, rather than a path?"""
    match = ID.fullmatch(source)
    return match is not None and not match[1].endswith((".safetensors", ".ckpt", ".pt", ".bin"))


def fetch(source: str, revision: str | None = None, token: str | None = None, variant: str | None = None) -> Path:
    """The folder of a repository `owner/name`, or the file of `owner/name:file`, in the hub's local cache.

    Without the network (HF_HUB_OFFLINE, or none is reached) it is what the cache has. ValueError in one line names the
    repository: no such one, no such revision, gated, not a model, or neither reached nor in the cache.
    """
    match = ID.fullmatch(source)
    assert match, source
    repo_id, file = match.groups()
    with told(source, revision):
        try:
            siblings = HfApi(token=token).model_info(repo_id, revision=revision).siblings or ()
        except (HTTPError, OSError) as error:
            if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
                raise
            return _cached(repo_id, revision, file)
        if file:
            return Path(hf_hub_download(repo_id, file, revision=revision, token=token))
        names = [sibling.rfilename for sibling in siblings]
        if INDEX not in names:
            offered = [name for name in names if name.endswith(".safetensors")]
            hint = f"; name one of its files, as in {repo_id}:{offered[0]}" if offered else ""
            raise ValueError(f"not a model (no {INDEX}){hint}")
        patterns = [glob.escape(name) for name in needed(names, variant)]
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns))


def _cached(repo_id: str, revision: str | None, file: str | None) -> Path:
    """What the cache has of a repository, be it a part: the reader names what is missing."""
    if file:
        return Path(hf_hub_download(repo_id, file, revision=revision, local_files_only=True))
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
