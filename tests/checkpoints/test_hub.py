"""Models by their names on the hub, played here by a server of our own: what is fetched, what is refused, the cache."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

from ldm.checkpoints import hub
from ldm.checkpoints.families import LoadOptions

COMMIT = "a" * 40
STRAYS = (  # of a repository, beside what is read
    "README.md",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/modelling.py",
    "safety_checker/model.safetensors",
    "tokenizer/tokenizer.bin",
)


REPOSITORIES = {
    "owner/adapter": ["README.md", "a.safetensors", "pytorch_lora_weights.safetensors"],
    "owner/peft": ["adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"],
    "owner/lone": ["README.md", "style-v1.5.safetensors"],
    "owner/two": ["a.safetensors", "b.safetensors"],
    "owner/word": ["learned_embeds.bin", "learned_embeds.safetensors", "other.safetensors"],
}


def server(repositories, asked):
    """The hub's two questions, on a port of its own: what is in a repository, and a file of it."""

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def reply(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            words = unquote(urlsplit(self.path).path).strip("/").split("/")
            api = words[:2] == ["api", "models"]
            words = words[2:] if api else words
            name = "/".join(words[:2])
            if name == "owner/gated":
                return self.reply(403, X_Error_Code="GatedRepo", X_Error_Message="gated")
            if name not in repositories:
                return self.reply(401, X_Error_Code="RepoNotFound", X_Error_Message="not found")
            folder = repositories[name]
            revision = words[3] if len(words) > 3 else "main"
            if revision not in ("main", COMMIT):
                return self.reply(404, X_Error_Code="RevisionNotFound", X_Error_Message="no revision")
            if api:
                return self.reply(200, self.listing(folder, words), Content_Type="application/json")
            file = folder.joinpath(*words[4:])
            if not file.is_file():
                return self.reply(404, X_Error_Code="EntryNotFound", X_Error_Message="no entry")
            if self.command == "GET":
                asked.append("/".join(words[4:]))
            data = file.read_bytes()
            return self.reply(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT)

        def listing(self, folder, words):
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            names = [path.relative_to(folder).as_posix() for path in files]
            if "tree" in words:
                sizes = [path.stat().st_size for path in files]
                rows = zip(names, sizes, strict=True)
                return json.dumps([{"type": "file", "path": n, "size": s, "oid": "b" * 40} for n, s in rows]).encode()
            return json.dumps({"id": "x", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}).encode()

    return ThreadingHTTPServer(("127.0.0.1", 0), Hub)


@pytest.fixture(scope="module")
def repository(tiny, tmp_path_factory):
    """The tiny model as it would lie on the hub, among what is not read."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("hub") / "repository")
    for name in STRAYS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"stray")
    return folder


@pytest.fixture(scope="module")
def site(repository, tiny, tmp_path_factory):
    """(address, the files that were asked for) of a hub."""
    plain = tmp_path_factory.mktemp("single")
    (plain / "model.safetensors").write_bytes(b"weights")
    asked = []
    found = {"owner/tiny": repository, "owner/single": plain, "owner/vae": repository / "vae"}
    for name, files in REPOSITORIES.items():
        found[name] = tmp_path_factory.mktemp("parts")
        for file in files:
            (found[name] / file).write_bytes(file.encode())
    running = server(found, asked)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", asked
    running.shutdown()


@pytest.fixture
def fetch(site, tmp_path, monkeypatch):
    """What `hub.fetch` returns or says, with a cache of its own, at an address, or offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def run(source, kind="model", address=site[0], offline=False, **options):
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        close_session()  # its client remembers whether it is offline
        try:
            return str(hub.download_from_hub(source, LoadOptions(**options), kind))
        except ValueError as error:
            return f"refused: {error}"
        finally:
            close_session()

    return run


def test_what_is_read_is_fetched_and_nothing_else(site, fetch, tiny):
    _, asked = site
    asked.clear()
    folder = Path(fetch("owner/tiny"))
    expected = {path.relative_to(tiny).as_posix() for path in tiny.rglob("*") if path.is_file()}
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == expected
    assert set(asked) == expected
    assert all((folder / name).read_bytes() == (tiny / name).read_bytes() for name in expected)
    asked.clear()
    again = fetch("owner/tiny"), fetch("owner/tiny", offline=True), fetch("owner/tiny", address="http://127.0.0.1:9")
    assert set(again) == {str(folder)} and not asked  # from the cache: no file came twice, no network was needed


def test_a_single_file_of_a_repository(fetch):
    assert Path(fetch("owner/single:model.safetensors")).read_bytes() == b"weights"


@pytest.mark.parametrize(
    "source, kind, files, called",
    [
        ("owner/adapter", "adapter", ["pytorch_lora_weights.safetensors"], "adapter"),
        ("owner/adapter:a.safetensors", "adapter", ["a.safetensors"], "a"),
        ("owner/peft", "adapter", ["adapter_model.safetensors", "adapter_config.json"], "peft"),
        ("owner/lone", "adapter", ["style-v1.5.safetensors"], "lone"),
        ("owner/word", "embedding", ["learned_embeds.safetensors"], "word"),
        ("owner/lone", "vae", ["style-v1.5.safetensors"], "lone"),
        ("owner/vae", "vae", ["config.json", "diffusion_pytorch_model.safetensors"], "vae"),
        ("owner/tiny", "vae", ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"], "tiny"),
    ],
)
def test_of_each_kind_its_files_alone_are_fetched(site, fetch, source, kind, files, called):
    _, asked = site
    asked.clear()
    path = Path(fetch(source, kind))
    assert sorted(asked) == sorted(files) and hub.name_from_repo_id(source) == called
    assert path.is_file() == files[0].endswith(".safetensors") and (path.is_dir() or path.name == files[0])
    asked.clear()
    assert fetch(source, kind, offline=True) == str(path) and not asked


def test_a_repository_of_several_adapters_lists_them(fetch):
    said = fetch("owner/two", "adapter")
    assert "not an adapter" in said and said.endswith(
        "name one of its files, as in owner/two:a.safetensors or b.safetensors"
    )


@pytest.mark.parametrize(
    "source, options, said",
    [
        ("owner/nothing", {}, "no such folder or file here, and no such model on the hub"),
        ("owner/gated", {}, "gated: its terms must be accepted"),
        ("owner/tiny", {"revision": "v9"}, "no revision 'v9'"),
        ("owner/tiny", {"variant": "bf16"}, "no weights of variant 'bf16'"),
        ("owner/tiny:other.safetensors", {}, "no such file on the hub"),
        (
            "owner/single",
            {},
            "not a model (no model_index.json); name one of its files, as in owner/single:model.safetensors",
        ),
        ("owner/na..me", {}, "not the name of a model on the hub"),
    ],
)
def test_what_cannot_be_fetched_is_said_in_a_line(fetch, source, options, said):
    answer = fetch(source, **options)
    assert answer.startswith(f"refused: {source}: ") and said in answer and "\n" not in answer


def test_without_the_network_it_is_said(fetch):
    offline = fetch("owner/tiny", offline=True), fetch("owner/tiny:a.safetensors", offline=True)
    assert all("not in the local cache, and cannot reach the hub" in said for said in offline)


@pytest.mark.parametrize(
    "source, name",
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", True),
        ("owner/name:model.fp16.safetensors", True),
        ("owner/name:unet/model.safetensors", True),
        ("./owner/name", False),
        ("../name", False),
        ("/owner/name", False),
        ("~/name", False),
        ("name", False),
        ("a/b/c", False),
        ("owner/model.safetensors", False),
        ("owner/model.ckpt", False),
        ("owner/name:model.ckpt", False),
        ("owner\\name", False),
        ("", False),
    ],
)
def test_a_name_is_told_from_a_path(source, name):
    assert hub.is_repo_id(source) is name
