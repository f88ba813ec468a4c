"""A local server with the parts of the Hub's interface that pushing and downloading need.

Answers have the form that huggingface_hub reads. Errors in a model card's metadata that the real
Hub refuses are refused here, too. Repositories are files in memory, by revision.
"""

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import constants
from transformers.utils import hub as transformers_hub

from tests.helpers.servers import JsonHandler, answering

TOKEN = "hf_secret"
_HEAD = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Hub:
    """The Hub's repositories, and a record of requests."""

    def __init__(self) -> None:
        self.created: list[dict] = []
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.tokens: set[str | None] = set()

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        return self.branches[repository, revision]

    def at(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """Return the commit id and the files of a revision: a branch or a commit id."""
        for (name, branch), files in self.branches.items():
            sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
            if name == repository and revision in (branch, sha):
                return sha, files
        raise KeyError(revision)


def refused(card: str) -> str | None:
    """Return why the Hub would refuse a card's metadata, or None."""
    found = _HEAD.match(card)
    if found is None:  # the Hub only warns
        return None
    data = yaml.safe_load(found[1])
    for field in ("base_model", "datasets"):
        value = data.get(field, [])
        for name in [value] if isinstance(value, str) else value:
            if not _ID.fullmatch(name):
                return f'"{field}" with value "{name}" is not valid'
    if data.get("base_model_relation", "adapter") not in ("adapter", "finetune", "merge"):
        return '"base_model_relation" is not valid'
    return None


class _Handler(JsonHandler):
    hub: Hub
    endpoint: str

    def parts(self) -> list[str]:
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.tokens.add(self.headers.get("Authorization"))
        parts = self.parts()
        if parts[1:] == ["repos", "create"]:
            asked = json.loads(body)
            self.hub.created.append(asked)
            repository = f"{asked['organization'] or 'me'}/{asked['name']}"
            self.hub.branches.setdefault((repository, "main"), {})
            self.answer({"url": f"{self.endpoint}/{repository}"})
        elif parts[1:] == ["validate-yaml"]:
            reason = refused(json.loads(body)["content"])
            errors = [{"message": reason}] if reason else []
            self.answer({"errors": errors, "warnings": []}, 400 if reason else 200)
        else:
            _, _, owner, name, action, revision = parts
            self.act(f"{owner}/{name}", action, revision, body)

    def act(self, repository: str, action: str, revision: str, body: bytes) -> None:
        if (repository, "main") not in self.hub.branches:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif action == "branch":
            self.hub.branches.setdefault((repository, revision), {})
            self.answer({})
        elif (repository, revision) not in self.hub.branches:
            self.answer({"error": "no such revision"}, 404, X_Error_Code="RevisionNotFound")
        elif action == "preupload":
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            paths = [each["path"] for each in json.loads(body)["files"]]
            self.answer({"files": [{"path": path, **mode} for path in paths]})
        elif action == "commit":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.hub.messages.append(value["summary"])
                else:
                    content = base64.b64decode(value["content"])
                    self.hub.files(repository, revision)[value["path"]] = content
            oid, _ = self.hub.at(repository, revision)
            address = f"{self.endpoint}/{repository}/commit/{oid}"
            self.answer({"success": True, "commitOid": oid, "commitUrl": address})
        else:
            self.answer({"error": action}, 501)

    def do_GET(self) -> None:
        parts = self.parts()
        if parts[0] == "api":
            parts = parts[2:]
        if len(parts) < 4:  # not a path in a repository
            self.answer({"error": self.path}, 404)
            return
        owner, name, action, revision, *file = parts
        repository = f"{owner}/{name}"
        try:
            sha, files = self.hub.at(repository, revision)
        except KeyError:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        oids = {path: hashlib.sha1(data).hexdigest() for path, data in files.items()}
        if action == "revision":
            self.answer({"id": repository, "sha": sha, "siblings": []})
        elif action == "tree":
            sizes = [{"path": path, "size": len(data)} for path, data in files.items()]
            self.answer([{"type": "file", "oid": oids[each["path"]], **each} for each in sizes])
        elif (path := "/".join(file)) in files:
            self.answer(files[path], ETag=f'"{oids[path]}"', X_Repo_Commit=sha)
        else:
            self.answer({"error": "no such file"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@contextlib.contextmanager
def local_hub(monkeypatch, cache: Path) -> Iterator[Hub]:
    """Run a local Hub, and make huggingface_hub use it with a token and a separate cache."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.endpoint = endpoint = f"http://127.0.0.1:{server.server_port}"
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", endpoint)
        # transformers caches a client with the endpoint at the first use.
        patch.setattr(transformers_hub, "_hf_api", None, raising=False)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("NO_PROXY", "127.0.0.1")
        with answering(server):
            yield hub
