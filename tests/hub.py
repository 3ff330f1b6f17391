"""A stand-in for the Hugging Face hub over one folder. It has the part of the API that pushing and loading a model use.

The real huggingface_hub connects to it by HF_ENDPOINT. Files of 100 bytes or more are large files (LFS), which the hub
names by SHA-256; it names others as git does. Only requests with TOKEN may write; all may read what is not in `gated`.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_onlyForTheStandIn"
_LARGE = 100


class Hub(http.server.ThreadingHTTPServer):
    """objects: SHA-256 -> bytes. commits: model -> each commit's name and files by SHA-256. puts: large files sent.

    names: SHA-256 -> name of the file's data on the hub. cut: files of which the next answer ends in the middle.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.objects: dict[str, bytes] = {}
        self.commits: dict[str, list[tuple[str, dict[str, str]]]] = {}
        self.names: dict[str, str] = {}
        self.gated: set[str] = set()
        self.cut: set[str] = set()
        self.puts: list[str] = []
        self.fetched: list[str] = []

    def commit(self, model: str, files: dict[str, bytes]) -> None:
        """Adds a commit with these files, which replace files of the same names."""
        tree = dict(self.commits[model][-1][1]) if self.commits.get(model) else {}
        for name, data in files.items():
            tree[name] = hashlib.sha256(data).hexdigest()
            self.objects[tree[name]] = data
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            self.names[tree[name]] = tree[name] if len(data) >= _LARGE else git
        self.commits.setdefault(model, []).append((f"{len(self.commits.get(model, [])) + 1:040x}", tree))

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Returns the environment of a process that uses this hub. home: folder of its cache."""
        found = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        found |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "JAX_PLATFORMS": "cpu"}
        return found | ({"HF_TOKEN": token} if token else {})


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Gives a hub without models."""
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            model = f"{asked['organization']}/{asked['name']}"
            there = model in self.server.commits
            self.server.commits.setdefault(model, [("0" * 40, {})])
            return self._json({"url": f"{self.server.url}/{model}", "name": model}, 409 if there else 200)
        if found := re.fullmatch("/api/models/(.+/.+)/preupload/main", path):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= _LARGE else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": modes})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                o if o["oid"] in self.server.objects else {**o, "actions": {"upload": {"href": self._lfs(o["oid"])}}}
                for o in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if found := re.fullmatch("/api/models/(.+/.+)/commit/main", path):
            files = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    files[value["path"]] = self.server.objects[value["oid"]]
            self.server.commit(found[1], files)
            name = self.server.commits[found[1]][-1][0]
            return self._json({"commitUrl": f"{self.server.url}/{found[1]}/commit/{name}", "commitOid": name})
        return self._json({"error": path}, 404)

    def do_PUT(self):
        sent = self.headers.get("Content-Length")
        data = self.rfile.read(int(sent)) if sent else b"".join(self._chunks())
        oid = self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.puts.append(oid)
        self.server.objects[oid] = data
        self._json({})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        found = re.fullmatch("/api/models/(.+?/.+?)/(revision|tree)/(.+)", path)
        file = re.fullmatch("/(.+?/.+?)/resolve/(.+?)/(.+)", path)
        model, revision = (found[1], found[3]) if found else (file[1], file[2]) if file else ("", "")
        if model not in self.server.commits:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if model in self.server.gated:
            return self._json({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
        commits = dict(self.server.commits[model])
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        tree = commits[commit]
        if found and found[2] == "revision":
            return self._json({"id": model, "sha": commit, "siblings": [{"rfilename": name} for name in tree]})
        if found:
            sizes = {name: len(self.server.objects[oid]) for name, oid in tree.items()}
            oids = {name: self.server.names[oid] for name, oid in tree.items()}
            return self._json([{"type": "file", "path": n, "size": sizes[n], "oid": oids[n]} for n in tree])
        if not file or file[3] not in tree:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        if self.command == "GET":
            self.server.fetched.append(file[3])
        oid = tree[file[3]]
        headers = {"ETag": f'"{self.server.names[oid]}"', "X-Repo-Commit": commit}
        self._send(self.server.objects[oid], 200, headers, cut=self.command == "GET" and file[3] in self.server.cut)
        self.server.cut.discard(file[3] if self.command == "GET" else "")

    def _lfs(self, oid: str) -> str:
        return f"{self.server.url}/lfs/{oid}"

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _json(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data: bytes, status: int, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection |= cut
