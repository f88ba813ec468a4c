"""A server with the HTTP interface that trainers use of vLLM: load, unload, list, complete.

It reads RaSA's files itself, so that it shares no code with the package.
"""

import contextlib
import copy
import json
import re
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.helpers.servers import JsonHandler, answering


class LoraServer(ThreadingHTTPServer):
    """A server that completes token ids with a causal language model and a request's adapter."""

    daemon_threads = True

    def __init__(self, base: nn.Module, max_rank: int = 64) -> None:
        super().__init__(("localhost", 0), _Handler)
        self.address = f"http://localhost:{self.server_address[1]}"
        self.base, self.max_rank = base, max_rank
        self.loras: dict[str, nn.Module] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.lost: list[str] = []
        """Paths of requests that the server executes once without sending the answer."""
        self.turn = threading.Lock()

    def load(self, body: dict[str, Any]) -> str:
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in self.loras:
            raise Refusal(400, f"The lora adapter '{name}' has already been loaded.")
        if not path.is_absolute() or not path.is_dir():
            raise Refusal(404, f"No adapter found for {path}")
        model, rank = adapted(self.base, path)
        if rank > self.max_rank:
            raise Refusal(400, f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}.")
        self.loras[name] = model
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: dict[str, Any]) -> str:
        if self.loras.pop(body["lora_name"], None) is None:
            raise Refusal(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        return "Success"

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["model"] not in self.loras:
            raise Refusal(404, f"The model `{body['model']}` does not exist.")
        model = self.loras[body["model"]]
        return {
            "choices": [
                {"index": index, **self._draw(model, prompt, body)}
                for index, prompt in reversed(list(enumerate(body["prompt"])))
            ]
        }

    def _draw(self, model: nn.Module, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
        tokens, told = list(prompt), []
        end = self.base.config.eos_token_id
        while len(told) < body["max_tokens"] and (not told or tokens[-1] != end):
            logits = log_probabilities(model, tokens)[-1]
            token = int(torch.multinomial((logits / body["temperature"]).softmax(-1), 1))
            told.append(logits[token].item())
            tokens.append(token)
        return {"token_ids": tokens[len(prompt) :], "logprobs": {"token_logprobs": told}}


@torch.no_grad()
def adapted(base: nn.Module, path: Path) -> tuple[nn.Module, int]:
    """Return a copy of the base with dW in its weights, and the effective rank."""
    tensors, pools = load_file(path / "adapter_model.safetensors"), {}
    for key in tensors:
        if key.endswith(".rasa_pool_A"):
            pools[_kind(key)] = tensors[key], tensors[f"{key[:-1]}B"]
    model, rank = copy.deepcopy(base).eval(), 0
    for key, d in tensors.items():
        if key.endswith(".rasa_d"):
            A, B = tensors[f"{key[:-1]}A"], tensors[f"{key[:-1]}B"]
            A_pool, B_pool = pools[_kind(key)]
            weight = model.get_submodule(key[len("base_model.model.") : -len(".rasa_d")]).weight
            weight += (torch.cat([B, B_pool], 1) * d) @ torch.cat([A, A_pool])
            rank = max(rank, len(d))
    return model, rank


def _kind(key: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", key.rpartition(".")[0], count=1)


class Refusal(Exception):
    """An error answer: HTTP status and message."""


@torch.no_grad()
def log_probabilities(model: nn.Module, tokens: list[int]) -> Tensor:
    """Compute log-probabilities of next tokens (tokens, vocabulary) in eval mode.

    The model's mode is restored.
    """
    training = model.training
    logits = model.eval()(input_ids=torch.tensor([tokens])).logits[0]
    model.train(training)
    return logits.float().log_softmax(-1)


@contextlib.contextmanager
def serving(base: nn.Module, **options: Any) -> Iterator[LoraServer]:
    server = LoraServer(base, **options)
    with answering(server):
        yield server


class _Handler(JsonHandler):
    server: LoraServer

    def do_GET(self) -> None:
        names = {"data": [{"id": name} for name in self.server.loras]}
        self.answer(names if self.path == "/v1/models" else {"message": self.path})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        does = {
            "/v1/load_lora_adapter": self.server.load,
            "/v1/unload_lora_adapter": self.server.unload,
            "/v1/completions": self.server.complete,
        }
        with self.server.turn:
            self.server.requests.append((self.path, body))
            try:
                code, told = 200, does[self.path](body)
            except Refusal as refusal:
                code, told = refusal.args[0], {"error": {"message": refusal.args[1]}}
        if self.path in self.server.lost:
            self.server.lost.remove(self.path)
            self.close_connection = True
            return
        self.answer(told, code)
