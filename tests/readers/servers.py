"""Start servers by their printed commands, on a free port."""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.readers.environments import environment


@dataclasses.dataclass(frozen=True)
class Post:
    """A callable that posts JSON to a path of a server, waiting until the server is up."""

    address: str
    server: subprocess.Popen
    log: Path

    def __call__(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(), headers)
        end = time.monotonic() + 900
        while True:
            assert self.server.poll() is None, self.log.read_text()[-6000:]
            try:
                with urllib.request.urlopen(request, timeout=300) as answer:
                    text = answer.read().decode()
                    return json.loads(text) if text.startswith("{") else text
            except urllib.error.HTTPError as error:
                raise AssertionError(error.read(), self.log.read_text()[-6000:]) from error
            except OSError:  # the server is not up yet
                assert time.monotonic() < end, self.log.read_text()[-6000:]
                time.sleep(1)


@contextlib.contextmanager
def served(reader: str, words: list[str], log: Path, **variables: str) -> Iterator[Post]:
    """Start a reader's server; yield a Post for it."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    command = [environment(reader) / words[0], *words[1:], "--port", port]
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    with open(log, "w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environ)
        try:
            yield Post(f"http://localhost:{port}", server, log)
        finally:
            server.terminate()
            server.wait(60)


def complete(post, model: str, tokens: list[int]) -> dict[str, float]:
    """Return the 20 likeliest next tokens and their log-probabilities, as vLLM answers."""
    told = post(
        "/v1/completions",
        {
            "model": model,
            "prompt": tokens,
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": 20,
            "return_tokens_as_token_ids": True,
        },
    )
    (first,) = told["choices"][0]["logprobs"]["top_logprobs"]
    return {token.removeprefix("token_id:"): value for token, value in first.items()}
