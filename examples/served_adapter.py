"""ServedAdapter: a vLLM server that follows an adapter in training, for TRL's GRPOTrainer.

Only the adapter travels, as an exact LoRA. The server keeps its base. Copy this file beside your
script; docs/rl.md shows the use.
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
import rasa_ext.peft

_PASSING = (502, 503, 504)
"""What a server answers while it starts, or a proxy before it."""


class ServerError(RuntimeError):
    """A server that refused a request, or gave no answer."""


class ServedAdapter(TrainerCallback):
    """Keep a server's LoRA that of the model in training, and let it complete prompts.

    As training begins, and after every step, the adapter is written as a LoRA into a new folder,
    exactly, and the server is told to load it; then the one before is unloaded and removed. The
    last one stays. Every LoRA has a name and a folder of its own: by these, and not by what is in
    it, vLLM tells the cached keys and values of prompts apart; and one that was loaded in place of
    another of its name it reads from the disk again at every step.

    With TRL's GRPOTrainer, pass it in ``callbacks`` and its ``rollout`` as ``rollout_func``.

    Args:
        server: the address of a vLLM server that was started with ``--enable-lora`` and
            ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``.
        directory: where the LoRAs are written; the server must find it under the same path.
        name: what their names begin with.
        every: the number of optimizer steps from one LoRA to the next.
        adapter_name: the adapter's name in a PEFT model.
        timeout: seconds to wait for an answer.
        tries: how often to send a request that gets none.

    Raises:
        ValueError: in the constructor, ``every`` or ``tries`` is below 1.
        ServerError: while training, the server refuses, or does not answer.
        OSError: while training, a LoRA cannot be written; the server then keeps the one before.

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
        """The name of the LoRA that the server has now."""
        self._prefix = f"{name}-{uuid.uuid4().hex[:6]}"  # another run may have left its own
        self._step = -1

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Send the adapter that training begins with."""
        self._send_from_first(state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Send the adapter as the step has left it."""
        if state.global_step % self.every == 0:
            self._send_from_first(state, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Send what was trained, unless the last step did."""
        if state.global_step != self._step:
            self._send_from_first(state, model)

    def _send_from_first(self, state: Any, model: nn.Module) -> None:
        """Let the first process send, and tell the others the name when the server has it."""
        if state.is_world_process_zero:
            self.send(model, state.global_step)
        names = [self.served]
        broadcast_object_list(names)  # at once where there is one process
        self.served, self._step = names[0], state.global_step

    def send(self, model: nn.Module, step: int) -> str:
        """Write the adapter's LoRA, have it loaded, and unload the one before.

        Args:
            model: a patched model, or a PEFT model with an adapter of this package.
            step: which the name ends in; larger than the last one.

        Returns:
            The name under which the server has it.

        Raises:
            ServerError, OSError: as in training.
        """
        name, before = f"{self._prefix}-{step}", self.served
        folder = self.directory.resolve() / name
        folder.mkdir(parents=True)
        try:
            # The reader is known: what other readers leave out does not matter.
            if isinstance(model, PeftModel):
                rasa_ext.peft.export_lora(
                    model, folder, self.adapter_name, allow_dropped=True, card=None
                )
            else:
                rasa_ext.export_lora(model, folder, allow_dropped=True, card=None)
            self._load(name, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.served = name
        if before is not None:
            self._unload(before)
            shutil.rmtree(folder.with_name(before), ignore_errors=True)
        return name

    def rollout(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Let the server complete prompts, one completion each: a ``rollout_func`` of TRL's.

        Args:
            prompts: texts, or conversations.
            trainer: the GRPOTrainer, whose arguments say how to draw.

        Returns:
            ``prompt_ids``, ``completion_ids`` and ``logprobs`` of the latter, each a list for
            every prompt.

        Raises:
            RuntimeError: nothing was sent yet, as if the callback had been left out.
            ServerError: the server refuses, or does not answer.
        """
        if self.served is None:
            raise RuntimeError("callbacks: expected this ServedAdapter there too; nothing is sent.")
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
                f"tell its token_ids, as vLLM does, got {len(choices)} choices, the first with "
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
            # It also refuses what it has already, if only its first answer was lost.
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
            if self._has(name):  # and not a server that was started anew
                raise

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Give the answer, from JSON if it is that; a POST if there is a body."""
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
            f"server: {self.server} {reason.rstrip('.')}. It must run vLLM with --enable-lora, a "
            "--max-lora-rank of at least the adapter's, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True."
        ) from cause


def _tokens(prompts: list[Any], trainer: Any) -> list[list[int]]:
    """Tokenize as the trainer does where it generates itself."""
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
