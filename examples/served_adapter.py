"""ServedAdapter: keep the adapter of a vLLM server up to date in training, for TRL's GRPOTrainer.

Only the adapter is sent, as it is trained; the server keeps its base model, and rasa_ext's plug-in
of vLLM reads the adapter. Copy this file beside your script. docs/rl.md shows how to use it.
"""

from __future__ import annotations

import http.client
import json
import shutil
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

import rasa_ext

_PASSING = (502, 503, 504)
"""HTTP codes of a server that is starting, or of a proxy in front of it."""


class ServerError(RuntimeError):
    """The server refused a request, or did not answer."""


class ServedAdapter(TrainerCallback):
    """Send a server the adapter of the model in training, and generate completions there.

    At the start of training, and every ``every`` steps, the adapter is saved in a new folder. The
    server loads it, and the previous adapter is unloaded and removed. The last one stays. Every
    adapter has a new name and folder, for two reasons. vLLM caches keys and values of prompts by
    name and folder, not by content. And if an adapter replaces another of equal name, vLLM reads it
    from disk again at every step.

    With TRL's GRPOTrainer, pass the object in ``callbacks`` and its ``rollout`` as
    ``rollout_func``.

    Args:
        server: address of a vLLM server that has rasa_ext installed and was started with
            ``--enable-lora`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``.
        directory: folder for the adapters, which must have this path on the server too.
        name: prefix of the adapters' names.
        every: number of optimizer steps between two syncs.
        adapter_name: the adapter's name in a PEFT model.
        timeout: seconds to wait for an answer.
        tries: how often to send a request that gets no answer.

    Raises:
        ValueError: in the constructor, ``every`` or ``tries`` is below 1.
        ServerError: in training, the server refuses a request or does not answer.
        OSError: in training, an adapter cannot be written; the server then keeps the previous one.

    Example:
        >>> from served_adapter import ServedAdapter
        >>> served = ServedAdapter("http://localhost:8000", "adapters")
        >>> served.served is None  # until training begins
        True
    """

    def __init__(
        self,
        server: str,
        directory: str | Path,
        *,
        name: str = "rasa",
        every: int = 1,
        adapter_name: str = "default",
        timeout: float = 600.0,
        tries: int = 5,
    ) -> None:
        for argument, value in (("every", every), ("tries", tries)):
            if value < 1:
                raise ValueError(f"{argument}: expected at least 1, got {value}.")
        self.server, self.directory = server.rstrip("/"), Path(directory)
        self.every, self.adapter_name = every, adapter_name
        self.timeout, self.tries = timeout, tries
        self.served: str | None = None
        """Name of the adapter on the server, or None before training."""
        # Random, because adapters of another run may still be on the server or in the folder.
        self._prefix = f"{name}-{uuid.uuid4().hex[:6]}"
        self._step = -1

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Send the initial adapter."""
        self._send_from_first(state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Send the adapter after every ``every``-th step."""
        if state.global_step % self.every == 0:
            self._send_from_first(state, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Send the trained adapter, unless the last step has sent it."""
        if state.global_step != self._step:
            self._send_from_first(state, model)

    def _send_from_first(self, state: Any, model: nn.Module) -> None:
        """Send from the first process, then broadcast the adapter's name to the others."""
        if state.is_world_process_zero:
            self.send(model, state.global_step)
        names = [self.served]
        broadcast_object_list(names)  # does nothing with one process
        self.served, self._step = names[0], state.global_step

    def send(self, model: nn.Module, step: int) -> str:
        """Save the adapter, load it on the server, and unload the previous one.

        Args:
            model: a patched model, or a PEFT model with an adapter of this package.
            step: number at the end of the adapter's name; larger than the previous one.

        Returns:
            The adapter's name on the server.

        Raises:
            ServerError: the server refuses a request or does not answer.
            OSError: the adapter cannot be written; the server keeps the previous one.
        """
        name, before = f"{self._prefix}-{step}", self.served
        folder = self.directory.resolve() / name
        folder.mkdir(parents=True)
        try:
            path = folder
            if isinstance(model, PeftModel):
                model.save_pretrained(
                    str(folder), selected_adapters=[self.adapter_name], save_embedding_layers=False
                )
                path = folder / ("" if self.adapter_name == "default" else self.adapter_name)
            else:
                rasa_ext.save_adapter(model, folder, card=None)
            self._load(name, path)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.served = name
        if before is not None:
            self._unload(before)
            shutil.rmtree(folder.with_name(before), ignore_errors=True)
        return name

    def rollout(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Generate one completion per prompt on the server, as TRL's ``rollout_func``.

        Args:
            prompts: texts, or conversations.
            trainer: the GRPOTrainer; its arguments set the sampling.

        Returns:
            ``prompt_ids``, ``completion_ids`` and the completions' ``logprobs``, each with one list
            per prompt.

        Raises:
            RuntimeError: no adapter was sent yet; usually the object is not in ``callbacks``.
            ServerError: the server refuses a request or does not answer.
        """
        if self.served is None:
            raise RuntimeError(
                "callbacks: expected this ServedAdapter, got none; no adapter was sent to vLLM."
            )
        args, tokens = trainer.args, _tokens(prompts, trainer)
        drawn = {
            "max_tokens": args.max_completion_length,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "top_k": args.top_k,
            "min_p": args.min_p or 0.0,
            "repetition_penalty": args.repetition_penalty,
            **(args.generation_kwargs or {}),
        }
        body = {"model": self.served, "prompt": tokens, **drawn}
        told = self._ask("/v1/completions", {**body, "logprobs": 0, "return_token_ids": True})
        choices = sorted(told["choices"], key=lambda choice: choice["index"])
        if len(choices) != len(tokens) or not all(each.get("token_ids") for each in choices):
            raise ServerError(
                f"server: expected {self.server} to complete each of {len(tokens)} prompts and to "
                f"return token_ids, as vLLM does, got {len(choices)} choices, the first with "
                f"{', '.join(choices[0]) if choices else 'nothing'}."
            )
        return {
            "prompt_ids": tokens,
            "completion_ids": [each["token_ids"] for each in choices],
            "logprobs": [each["logprobs"]["token_logprobs"] for each in choices],
        }

    def _load(self, name: str, folder: Path) -> None:
        try:
            self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except ServerError:
            # The server also refuses an adapter that it has: its first answer may have been lost.
            if not self._has(name):
                raise

    def _has(self, name: str) -> bool:
        try:
            return any(each["id"] == name for each in self._ask("/v1/models")["data"])
        except (ServerError, LookupError, TypeError):
            return False

    def _unload(self, name: str) -> None:
        try:
            self._ask("/v1/unload_lora_adapter", {"lora_name": name})
        except ServerError:
            if self._has(name):  # a restarted server no longer has the adapter, which is no error
                raise

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request (POST if there is a body) and return its answer, decoded if it is JSON."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.server}{path}", data, headers)
        cause: Exception
        for tried in range(self.tries):
            if tried:
                time.sleep(min(2 ** (tried - 1), 30))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    text = answer.read().decode()
                    return json.loads(text) if text.startswith("{") else text
            except urllib.error.HTTPError as error:
                told = error.read().decode(errors="replace")[:2000]
                reason, cause = f"refused {path} with {error.code}: {told}", error
                if error.code not in _PASSING:
                    break
            except (OSError, http.client.HTTPException) as error:
                reason, cause = f"did not answer {path} ({error}), {self.tries} times", error
        raise ServerError(
            f"server: {self.server} {reason.rstrip('.')}. It must run vLLM with rasa_ext, "
            "--enable-lora, a --max-lora-rank of at least the adapter's effective rank, and "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True."
        ) from cause


def _tokens(prompts: list[Any], trainer: Any) -> list[list[int]]:
    """Tokenize like the trainer's own generation."""
    tokenizer = trainer.processing_class
    if isinstance(prompts[0], str):
        found: list[list[int]] = tokenizer(text=prompts)["input_ids"]
        return found
    options = {"tools": trainer.tools or None, "chat_template": trainer.chat_template}
    rendered = tokenizer.apply_chat_template(
        conversation=prompts,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **options,
        **trainer.chat_template_kwargs,
    )
    chat: list[list[int]] = rendered["input_ids"]
    return chat
