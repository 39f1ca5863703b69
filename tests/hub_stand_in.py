"""A stand-in for the hub on this machine: what huggingface_hub calls to create a repository and commit to it, over real HTTP.

    with Hub() as hub:
        ...HF_ENDPOINT=hub.url HF_HUB_DISABLE_XET=1 HF_TOKEN=hub.token...
        hub.repos["model", "someone/tiny"].files     what has arrived, by name

Files travel as the real hub asks for them: small texts inside the commit, weights by LFS (batch, PUT, verify), where the bytes are
checked against the hash that was promised. What was committed can be read back, as from_pretrained does. What it does not have: Xet,
gated repositories, branches.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "standin" * 5


@dataclass
class Repo:
    private: bool
    sdk: str | None = None
    sha: str = "1" * 40
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class Hub:
    """Answers on loopback until the block ends. `break_at` names a part of an address at which it hangs up instead."""

    def __init__(self) -> None:
        self.token, self.owners, self.break_at = TOKEN, {"someone"}, ""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.no_such_type = False
        """Answers as if the name belonged to something else."""

    def __enter__(self) -> "Hub":
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing on the tests' console."""

    def do_GET(self) -> None:
        self.handle_one(b"")

    def do_POST(self) -> None:
        self.handle_one(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    do_PUT = do_POST
    do_HEAD = do_GET

    def answer(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_one(self, body: bytes) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        if hub.break_at and hub.break_at in path:
            self.close_connection = True
            self.connection.close()
            return None
        if path.startswith("/lfs/"):  # signed addresses: no token goes there
            return self.store(path.rpartition("/")[2], body)
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        if "/resolve/" in path:
            return self.read(*path.strip("/").split("/resolve/"))
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        parts = path.strip("/").split("/")
        kind, name = parts[1].removesuffix("s"), "/".join(parts[2:4])
        repo = hub.repos.get((kind, name))
        if repo is None or hub.no_such_type:
            return self.answer(404, {"error": "Repository not found"})
        if len(parts) == 4 or parts[4] == "revision":
            files = [{"rfilename": file} for file in repo.files]
            return self.answer(200, {"id": name, "private": repo.private, "siblings": files, "sha": repo.sha, "tags": []})
        if parts[4] == "tree":
            below = "/".join(parts[6:])
            found = [{"type": "file", "path": f, "size": len(b), "oid": "0"} for f, b in repo.files.items() if f.startswith(below)]
            return self.answer(200, found) if found else self.missing()
        if parts[4] == "preupload":
            modes = [{"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self.answer(200, {"files": modes})
        if parts[4] == "commit":
            return self.commit(repo, name, [json.loads(line) for line in body.splitlines()])
        return self.answer(404, {"error": f"the stand-in knows no {path}"})

    def missing(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def read(self, name: str, place: str) -> None:
        """A file of a model, with the headers from which the client's cache names it."""
        repo, file = self.hub.repos.get(("model", name)), place.partition("/")[2]
        if repo is None or file not in repo.files:
            return self.missing()
        content = repo.files[file]
        self.send_response(200)
        self.send_header("X-Repo-Commit", repo.sha)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def create(self, asked: dict[str, Any]) -> None:
        hub, kind, owner = self.hub, asked.get("type") or "model", asked["organization"]
        name = f"{owner}/{asked['name']}"
        prefix = {"model": "", "space": "spaces/", "dataset": "datasets/"}[kind]
        if owner not in hub.owners:
            return self.answer(403, {"error": f'You don\'t have the rights to create a {kind} under the namespace "{owner}"'})
        if (kind, name) in hub.repos or hub.no_such_type:
            return self.answer(409, {"error": "You already created this repo", "url": f"{hub.url}/{prefix}{name}"})
        hub.repos[kind, name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")), asked.get("sdk"))
        return self.answer(200, {"url": f"{hub.url}/{prefix}{name}", "name": name, "id": "1"})

    def batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            there = one["oid"] in self.hub.stored
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}", "header": {}}}
            objects.append({**one, **({} if there else {"actions": upload})})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "these bytes do not have the hash that was promised"})
        self.hub.stored[oid] = body
        return self.answer(200, {})

    def commit(self, repo: Repo, name: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo.commits.append(value["summary"])
            elif line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.stored[value["oid"]]
            else:
                return self.answer(400, {"error": f"the stand-in takes no {line['key']}"})
        return self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/1", "commitOid": "1" * 40, "pullRequestUrl": None})


def _mode(path: str) -> str:
    """As the hub's .gitattributes has it."""
    return "lfs" if path.endswith((".safetensors", "tokenizer.json")) else "regular"
