"""Download models from the Hugging Face hub, by `owner/name`: only the files that are read, into its cache."""

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

from ldm.checkpoints.families import LoadOptions
from ldm.checkpoints.layouts import MODEL_INDEX_NAME, select_component_files, select_model_files
from ldm.checkpoints.tensors import PICKLE_SUFFIXES

REPO_NAME_PATTERN = r"[A-Za-z0-9_][\w.-]*"
REPO_ID_PATTERN = re.compile(rf"({REPO_NAME_PATTERN}/{REPO_NAME_PATTERN})(?::(.+\.safetensors))?")
TOKEN_REQUIRED = "a token of yours is needed, in HF_TOKEN"
# names of the libraries that write these files: diffusers' adapters and embeddings, peft's adapters
LORA_WEIGHT_NAME_SAFE = "pytorch_lora_weights.safetensors"
TEXT_INVERSION_NAME_SAFE = "learned_embeds.safetensors"
PEFT_LORA_NAME, PEFT_CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"


def is_repo_id(source: str) -> bool:
    """Whether it is `owner/name` or `owner/name:file.safetensors`, rather than a path."""
    match = REPO_ID_PATTERN.fullmatch(source)
    return match is not None and not match[1].endswith((".safetensors", *PICKLE_SUFFIXES))


def name_from_repo_id(source: str) -> str:
    """The name of an adapter or embedding: its file's stem, or the repository's name if a library chose the file's."""
    match = REPO_ID_PATTERN.fullmatch(source)
    assert match, source
    file = Path(match[2] or LORA_WEIGHT_NAME_SAFE)
    usual = file.name in (LORA_WEIGHT_NAME_SAFE, PEFT_LORA_NAME, TEXT_INVERSION_NAME_SAFE)
    return match[1].rpartition("/")[2] if usual else file.stem


class RepoContent(NamedTuple):
    """A kind of content: its description in errors, and the function that selects its files, if there are any."""

    description: str
    select_files: Callable[[Sequence[str], str | None], list[str]]


def _select_model_files(names: Sequence[str], variant: str | None) -> list[str]:
    return select_model_files(names, variant) if MODEL_INDEX_NAME in names else []


def _select_vae_files(names: Sequence[str], variant: str | None) -> list[str]:
    for folder in ("", "vae/"):
        if f"{folder}config.json" in names:
            vae_files = [name.removeprefix(folder) for name in names if name.startswith(folder)]
            return [f"{folder}{name}" for name in select_component_files(vae_files, "vae", variant)]
    return _select_first(names)


def _select_first(names: Sequence[str], *groups: list[str]) -> list[str]:
    """The first group of files that is complete, else the weights, if they are one file."""
    weights = [name for name in names if name.endswith(".safetensors")]
    complete = (group for group in groups if {*group} <= {*names})
    return next(complete, weights if len(weights) == 1 else [])


REPO_CONTENTS = {
    "model": RepoContent(f"a model (no {MODEL_INDEX_NAME})", _select_model_files),
    "vae": RepoContent("an autoencoder", _select_vae_files),
    "adapter": RepoContent(
        f"an adapter (no {LORA_WEIGHT_NAME_SAFE})",
        lambda names, variant: _select_first(names, [LORA_WEIGHT_NAME_SAFE], [PEFT_LORA_NAME, PEFT_CONFIG_NAME]),
    ),
    "embedding": RepoContent(
        f"an embedding (no {TEXT_INVERSION_NAME_SAFE})",
        lambda names, variant: _select_first(names, [TEXT_INVERSION_NAME_SAFE]),
    ),
}


def download_from_hub(source: str, options: LoadOptions = LoadOptions(), kind: str = "model") -> Path:
    """The cached folder or file of a kind of `REPO_CONTENTS` in a repository, or the file `owner/name:file`.

    Without network access (or with HF_HUB_OFFLINE) only the cache is used. ValueError names the repository: unknown,
    unknown revision, gated, without that kind of content, or neither reachable nor cached.
    """
    match = REPO_ID_PATTERN.fullmatch(source)
    assert match, source
    (repo_id, file), revision, token = match.groups(), options.revision, options.token
    with translate_hub_errors(source, revision):
        try:
            if options.local_files_only:
                raise OSError("local files only")
            siblings = HfApi(token=token).model_info(repo_id, revision=revision).siblings or ()
            names, folder = [sibling.rfilename for sibling in siblings], None
        except (HTTPError, OSError) as error:
            if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
                raise
            if file:
                return Path(hf_hub_download(repo_id, file, revision=revision, local_files_only=True))
            folder = _cached_snapshot(repo_id, revision)
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        if file:
            return Path(hf_hub_download(repo_id, file, revision=revision, token=token))
        if not (picked := REPO_CONTENTS[kind].select_files(names, options.variant)):
            raise ValueError(f"not {REPO_CONTENTS[kind].description}{_suggest_files(repo_id, names)}")
        if folder is None:
            patterns = [glob.escape(name) for name in picked]
            folder = Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns))
        return folder / picked[0] if picked[0].endswith(".safetensors") else folder


def download_file(repo_id: str, name: str, revision: str | None = None) -> Path:
    """The cached path of one file of a repository; ValueError as `download_from_hub`."""
    with translate_hub_errors(repo_id, revision):
        return Path(hf_hub_download(repo_id, name, revision=revision))


def download_dataset(repo_id: str) -> Path:
    """The cached folder of a data set's repository, all of its files; ValueError as `download_from_hub`."""
    with translate_hub_errors(repo_id, None):
        return Path(snapshot_download(repo_id, repo_type="dataset"))


def create_repo(repo_id: str, private: bool) -> None:
    """Make a repository for a model, unless there is one; ValueError as `download_from_hub`."""
    with translate_hub_errors(repo_id, None):
        HfApi().create_repo(repo_id, private=private, exist_ok=True)


def upload_folder(folder: Path, repo_id: str, private: bool, token: str | None, message: str) -> str:
    """Make a repository, if need be, of a folder's files, and return its address; ValueError as `download_from_hub`."""
    with translate_hub_errors(repo_id, None):
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message=message))


def _suggest_files(repo_id: str, names: Sequence[str]) -> str:
    """The end of an error message: the files of a repository that can be named."""
    offered = [name for name in names if name.endswith(".safetensors")]
    also = f" or {', '.join(offered[1:])}" if offered[1:] else ""
    return f"; name one of its files, as in {repo_id}:{offered[0]}{also}" if offered else ""


def _cached_snapshot(repo_id: str, revision: str | None) -> Path:
    """The cached part of a repository: whoever reads it names what is missing."""
    try:
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except IncompleteSnapshotError as error:
        return Path(error.snapshot_path)


@contextmanager
def translate_hub_errors(source: str, revision: str | None) -> Iterator[None]:
    """Raise the hub's errors as ValueError in one line that begins with the repository's name."""
    try:
        yield
    except GatedRepoError:
        reason = f"gated: its terms must be accepted on the hub, and {TOKEN_REQUIRED}"
    except RepositoryNotFoundError:
        reason = f"no such folder or file here, and no such model on the hub; if it is private, {TOKEN_REQUIRED}"
    except RevisionNotFoundError:
        reason = f"no revision {revision!r}"
    except EntryNotFoundError as error:
        local = isinstance(error, FileNotFoundError)
        what = f"revision {revision!r} is not" if revision else "not"
        reason = f"{what} in the local cache, and cannot reach the hub" if local else "no such file on the hub"
    except HFValidationError:
        reason = "not the name of a model on the hub"
    except (HTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        lost = f"cannot reach the hub ({type(error).__name__})"
        reason = f"the hub does not allow it: {TOKEN_REQUIRED}" if status in (401, 403) else lost
    except ValueError as error:
        reason = str(error)
    else:
        return
    raise ValueError(f"{source}: {' '.join(reason.split())}")
