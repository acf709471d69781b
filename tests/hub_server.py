"""A stand-in for the Hugging Face Hub on loopback, for tests that must not need the network.

It answers what `load_dataset`, `hf_hub_download` and `Tokenizer.from_pretrained` ask for. These libraries
read the endpoint when they are imported, so run the client in a subprocess:

    with HubServer(datasets={"Salesforce/wikitext": wikitext_repo({"train": ["A line ."]})}) as hub:
        subprocess.run([sys.executable, "-c", code], env=hub.env(tmp_path), check=True)
    assert hub.asked("train-00000-of-00001.parquet")
"""

import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

CONFIG = "wikitext-2-raw-v1"
HANG = 0  # as a status in `fail`: take the request and never answer
API = re.compile(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?")
RESOLVE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)")
Repos = Mapping[str, Mapping[str, bytes]]
NONE: Mapping = {}


def wikitext_repo(splits: Mapping[str, Sequence[str]]) -> dict[str, bytes]:
    """Return a small Salesforce/wikitext; rows are `""` or `" the text \\n"`, as in the real one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files, info, configs = {}, "", ""
    for split, lines in splits.items():
        rows = [f" {line.strip()} \n" if line.strip() else "" for line in lines]
        buffer = io.BytesIO()
        pq.write_table(pa.table({"text": pa.array(rows, pa.string())}), buffer)
        files[f"{CONFIG}/{split}-00000-of-00001.parquet"] = buffer.getvalue()
        info += f"  - name: {split}\n    num_bytes: {buffer.tell()}\n    num_examples: {len(rows)}\n"
        configs += f"  - split: {split}\n    path: {CONFIG}/{split}-*\n"
    card = f"dataset_info:\n- config_name: {CONFIG}\n  features:\n  - name: text\n    dtype: string\n"
    card += f"  splits:\n{info}configs:\n- config_name: {CONFIG}\n  data_files:\n{configs}"
    return {"README.md": f"---\n{card}---\n\n# WikiText, cut down for tests\n".encode(), **files}


def etag_of(path: str, body: bytes) -> str:
    """Return the Hub's id of a file: sha256 for LFS files (parquet), the git blob sha1 for all others."""
    lfs = path.endswith(".parquet")
    return (hashlib.sha256(body) if lfs else hashlib.sha1(b"blob %d\0" % len(body) + body)).hexdigest()


def listing(files: Mapping[str, bytes], folder: str) -> list[dict[str, object]]:
    """List a folder of a repository ("" is its root), not what is below, as the tree API does."""
    under = f"{folder}/" if folder else ""
    names = sorted({file.removeprefix(under).split("/")[0] for file in files if file.startswith(under)})
    sizes = {under + name: len(files.get(under + name, b"")) for name in names}
    kinds = ("directory", "file")
    return [{"type": kinds[at in files], "path": at, "size": sizes[at], "oid": "0" * 40} for at in sizes]


class HubServer:
    """Serve repositories (`{"owner/name": {"path": b"..."}}`) as the Hub does, while the context is open.

    `fail` maps a regular expression to the status (or `HANG`) of each request it finds in "METHOD /path";
    it may be changed while serving. `requests` lists what was asked, as `("METHOD", "/path?query")`.
    """

    def __init__(self, datasets: Repos = NONE, models: Repos = NONE, fail: Mapping[str, int] = NONE) -> None:
        self.repos = {"datasets": datasets, "models": models}
        self.fail = dict(fail)
        self.requests: list[tuple[str, str]] = []
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def asked(self, part: str) -> list[tuple[str, str]]:
        """Return the requests whose path contains `part`."""
        return [request for request in list(self.requests) if part in request[1]]

    def env(self, hf_home: Path | str, **extra: str) -> dict[str, str]:
        """Return a client's environment: no HF_* setting but ours, and no way out (we are the proxy too)."""
        ours = re.compile("^HF_|_OFFLINE$|_proxy$", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not ours.search(name)}
        proxy = {"HTTP_PROXY": self.url, "HTTPS_PROXY": self.url, "NO_PROXY": "127.0.0.1,localhost"}
        return {**kept, **proxy, "HF_ENDPOINT": self.url, "HF_HOME": str(hf_home), **extra}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"  # keeps connections open, as the Hub does

    def do_GET(self) -> None:
        self.hub.requests.append((self.command, self.path))
        url = urlsplit(self.path)
        call = f"{self.command} {url.path}"
        status = next((status for pattern, status in self.hub.fail.items() if re.search(pattern, call)), None)
        if status == HANG:
            self.close_connection = self.hub.closing.wait()
        elif status or url.netloc or not (found := API.fullmatch(url.path) or RESOLVE.fullmatch(url.path)):
            self.reply(status or 404, {"error": "unknown path, or told to fail"})
        else:
            self.answer(*(unquote(part or "") for part in found.groups()))

    do_HEAD = do_GET

    def answer(self, kind: str, name: str, call: str, revision: str, path: str) -> None:
        """Answer a call of the API ("revision", "tree" or none of them) or a download ("resolve")."""
        if (files := self.hub.repos[kind or "models"].get(name)) is None:  # the Hub says 401, not 404
            return self.reply(401, {"error": "Invalid username or password."}, "RepoNotFound")
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        head = {"X-Repo-Commit": commit}
        if revision not in ("", "main", commit):
            return self.reply(404, {"error": f"Invalid rev id: {revision}"}, "RevisionNotFound")
        if call == "resolve" and path in files:
            return self.reply(200, files[path], ETag=f'"{etag_of(path, files[path])}"', **head)
        if call == "tree" and (found := listing(files, path)):
            return self.reply(200, found)
        if call in ("", "revision"):
            return self.reply(200, {"id": name, "sha": commit, "private": False, "gated": False, "tags": []})
        return self.reply(404, {"error": "Entry not found"}, "EntryNotFound", **head)

    def reply(self, status: int, body: bytes | dict | list, error: str = "", **headers: str) -> None:
        """Send a file (or the range of it that was asked for) or a JSON answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part and isinstance(body, bytes):
            first, end = int(part[1]), min(int(part[2] or len(data)) + 1, len(data))
            status, headers["Content-Range"] = 206, f"bytes {first}-{end - 1}/{len(data)}"
            data = data[first:end]
        self.send_response(status)
        for header in {**headers, "X-Error-Code": error, "Content-Length": str(len(data))}.items():
            self.send_header(*header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Stay quiet: `HubServer.requests` is the log."""
