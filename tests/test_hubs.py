"Hugging Face and Kaggle, by their own libraries, against small servers that speak the hubs' language."

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from eurosat_mlops.core import EurosatError
from eurosat_mlops.datasets import fetch_hub
from eurosat_mlops.sources import open_pictures

pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")
pytest.importorskip("kagglehub", reason="the hub extra is not installed")

COMMIT, TOKEN = "0123456789" * 4, "hf_thisIsASecretThatNobodyMaySee"
CALL = """
import logging, sys
from pathlib import Path
from eurosat_mlops.core import EurosatError
from eurosat_mlops.datasets import fetch_hub
logging.basicConfig(level=logging.DEBUG)
try:
    print("FOUND", fetch_hub(sys.argv[1], Path(sys.argv[2])))
except EurosatError as error:
    print("REFUSED", error)
"""


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 9, 9)).save(file, "PNG")
    return file.getvalue()


FILES = {
    f"{part}/{label}/{n} é.png": picture(n) for n, part in enumerate(("train", "test")) for label in ("cat", "dog")
}


def packed(files: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


class Hub(BaseHTTPRequestHandler):
    "Both hubs; the server holds the files and what is wrong with it."

    protocol_version = "HTTP/1.1"

    def answer(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        headers |= {"Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.server.cut and kind != "application/json" else body)
            self.close_connection = self.server.cut

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append((path, self.headers.get("Authorization")))
        refused = next((answer for word, answer in hub.refuse.items() if word in path), None)
        if refused:
            self.answer(refused[0], json.dumps({"error": "no"}).encode(), X_Error_Code=refused[1], X_Error_Message="no")
        elif "/resolve/" in path:
            body = hub.files[unquote(path.partition(f"/resolve/{COMMIT}/")[2])]
            mark = hashlib.sha256(body).hexdigest()[:40]
            self.answer(200, body, "application/octet-stream", ETag=mark, X_Repo_Commit=COMMIT)
        elif "/tree/" in path:
            tree = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in hub.files.items()]
            self.answer(200, json.dumps(tree).encode())
        else:
            siblings = [{"rfilename": name} for name in hub.files]
            self.answer(200, json.dumps({"id": "some/set", "sha": COMMIT, "siblings": siblings}).encode())

    do_HEAD = do_GET

    def do_POST(self) -> None:
        hub = self.server
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        hub.asked.append((self.path, self.headers.get("Authorization")))
        hub.sent.append(sent)
        if refused := next((answer for word, answer in hub.refuse.items() if word in self.path), None):
            self.answer(refused[0], json.dumps({"code": refused[0], "message": "no"}).encode())
        elif "DownloadDataset" in self.path:
            self.answer(200, packed(hub.files), "application/zip")
        else:
            self.answer(200, json.dumps({"currentVersionNumber": 7}).encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.refuse, server.asked, server.sent, server.cut = dict(FILES), {}, [], [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(hub: ThreadingHTTPServer, data: str, folder: Path, **more: str) -> str:
    "What a new process says, which must not be the key."
    secret = ("TOKEN", "KAGGLE_", "HF_", "_proxy", "_PROXY")
    home = {"HOME": str(folder / "home"), "HF_HOME": str(folder / "home")}
    place = f"http://127.0.0.1:{hub.server_port}"
    hubs = {"HF_ENDPOINT": place, "KAGGLE_API_ENVIRONMENT": "LOCALHOST", "http_proxy": place}
    hubs = hubs if data.startswith("kaggle") else {"HF_ENDPOINT": place}
    keep = {name: value for name, value in os.environ.items() if not any(word in name for word in secret)}
    command = [sys.executable, "-c", CALL, data, str(folder)]
    done = subprocess.run(command, env=keep | home | hubs | more, capture_output=True, text=True, timeout=100)
    assert TOKEN not in done.stdout + done.stderr
    assert not [f for f in folder.rglob("*") if f.is_file() and TOKEN.encode() in f.read_bytes()]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FOUND", "REFUSED"))]
    assert len(lines) == 1, done.stderr
    return lines[0]


def contents(path: Path) -> dict[str, bytes]:
    with open_pictures(path) as pictures:
        return {pictures.names[row]: pictures.read(row) for row in pictures.order}


@pytest.mark.parametrize("kind", ["hf", "kaggle"])
def test_a_whole_set_arrives_and_stays(hub, tmp_path, kind):
    hub.files |= {"README.md": b"x", "model.safetensors": bytes(9)}
    folder = tmp_path / kind / "some/set"
    assert fetch(hub, f"{kind}:some/set", tmp_path) == f"FOUND {folder}"
    assert contents(folder) == FILES
    if kind == "hf":
        assert not (folder / "model.safetensors").exists() and not any("model" in path for path, _ in hub.asked)
    count = len(hub.asked)
    assert fetch(hub, f"{kind}:some/set", tmp_path) == f"FOUND {folder}" and len(hub.asked) == count


def test_a_revision_is_asked_for_and_kept_by_itself(hub, tmp_path):
    assert fetch(hub, "hf:some/set@refs/v2", tmp_path).endswith("some/set@refs%2Fv2")
    assert "/api/datasets/some/set/revision/refs%2Fv2" in {path for path, _ in hub.asked}
    assert fetch(hub, "kaggle:some/set@3", tmp_path).endswith("some/set@3")
    assert hub.sent == [{"ownerSlug": "some", "datasetSlug": "set", "datasetVersionNumber": 3}]


@pytest.mark.parametrize(("kind", "variable"), [("hf", "HF_TOKEN"), ("kaggle", "KAGGLE_API_TOKEN")])
def test_the_key_goes_to_the_hub_and_nowhere_else(hub, tmp_path, kind, variable):
    assert fetch(hub, f"{kind}:some/set", tmp_path, **{variable: TOKEN}).startswith("FOUND")
    assert f"Bearer {TOKEN}" in {key for _, key in hub.asked} <= {f"Bearer {TOKEN}", None}


@pytest.mark.parametrize(
    ("kind", "variable", "where", "status", "code", "why"),
    [
        ("hf", "HF_TOKEN", "/api/", 404, "RepoNotFound", "not found on Hugging Face; check the name at https://hugg"),
        ("hf", "HF_TOKEN", "/api/", 401, "", "private or gated, or there is none of that name"),
        ("hf", "HF_TOKEN", "/resolve/", 403, "GatedRepo", "refused it (403): it is private or gated. See https://hugg"),
        ("hf", "HF_TOKEN", "/api/", 500, "", "Hugging Face answered 500"),
        (
            "kaggle",
            "KAGGLE_API_TOKEN",
            "GetDataset",
            404,
            "",
            "not found on Kaggle; check the name at https://www.kagg",
        ),
        ("kaggle", "KAGGLE_API_TOKEN", "GetDataset", 403, "", "refused it (403): it is private or gated. See"),
        (
            "kaggle",
            "KAGGLE_API_TOKEN",
            "Download",
            401,
            "",
            "refused it (401): it is private or gated, or there is none",
        ),
        ("kaggle", "KAGGLE_API_TOKEN", "Download", 500, "", "Kaggle answered 500"),
    ],
)
@pytest.mark.parametrize("key", [False, True])
def test_a_refusal_says_what_to_do(hub, tmp_path, kind, variable, where, status, code, why, key):
    hub.refuse[where] = (status, code)
    said = fetch(hub, f"{kind}:some/set", tmp_path, **({variable: TOKEN} if key else {}))
    assert said.startswith(f"REFUSED {kind}:some/set: ") and why in said
    if status in (401, 403):
        assert said.endswith(f"ask for access there; {variable} is {'set' if key else 'not set'}")


def test_an_unknown_revision_is_said(hub, tmp_path):
    hub.refuse["/revision/"] = (404, "RevisionNotFound")
    assert "check the name and the revision" in fetch(hub, "hf:some/set@v9", tmp_path)


@pytest.mark.parametrize("kind", ["hf", "kaggle"])
def test_no_network_is_said(hub, tmp_path, kind):
    hub.server_port = 9
    said = fetch(hub, f"{kind}:some/set", tmp_path, HF_TOKEN=TOKEN, KAGGLE_API_TOKEN=TOKEN)
    assert "could not be fetched" in said and "Connection refused" in said and "check the network" in said
    assert "OfflineMode" in fetch(hub, "hf:some/set", tmp_path, HF_HUB_OFFLINE="1")


@pytest.mark.parametrize("kind", ["hf", "kaggle"])
def test_half_a_set_is_never_taken_for_whole(hub, tmp_path, kind):
    hub.cut = True
    assert "could not be fetched" in fetch(hub, f"{kind}:some/set", tmp_path)
    hub.cut = False
    hub.refuse["/tree/"] = hub.refuse["1%20"] = hub.refuse["Download"] = (404, "RepoNotFound")
    assert fetch(hub, f"{kind}:some/set", tmp_path).startswith("REFUSED")
    hub.refuse.clear()
    assert fetch(hub, f"{kind}:some/set", tmp_path).startswith("FOUND")
    assert contents(tmp_path / kind / "some/set") == FILES


@pytest.mark.parametrize("kind", ["hf", "kaggle"])
def test_a_lone_archive_is_opened_as_such(hub, tmp_path, kind):
    hub.files = {"data/pictures.zip": packed(FILES), "README.md": b"x"}
    path = tmp_path / kind / "some/set/data/pictures.zip"
    assert fetch(hub, f"{kind}:some/set", tmp_path) == f"FOUND {path}" and contents(path) == FILES


@pytest.mark.parametrize("kind", ["hf", "kaggle"])
def test_a_set_of_something_else_is_said(hub, tmp_path, kind):
    hub.files = {"README.md": b"x", "speech.mp3": b"x"}
    assert "holds nothing to read" in fetch(hub, f"{kind}:some/set", tmp_path)


@pytest.mark.parametrize(
    "data", ["hf:set", "hf:../../etc", "hf:a/..", "hf:a/b@../c", "kaggle:a/b/c", "hub:a/b", "hf:a/b@"]
)
def test_names_that_are_none_are_refused(tmp_path, data):
    with pytest.raises(EurosatError, match="expected hf:owner/name or kaggle:owner/name"):
        fetch_hub(data, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("data", "library"), [("hf:a/b", "huggingface_hub"), ("kaggle:a/b", "kagglehub")])
def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, data, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(EurosatError, match=rf"fetching it needs {library}; pip install 'eurosat-mlops\[hub\]'"):
        fetch_hub(data, tmp_path)
