"""A model that answers, word by word."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextIteratorStreamer, set_seed

from rasa_ext.commands.data import prompt_text


@dataclass(frozen=True)
class Speaker:
    """A model with its tokenizer, and how it is to answer."""

    model: Any
    tokenizer: Any
    template: bool = True
    """Whether the chat template is used, where there is one; else texts are joined by lines."""
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0

    def answer(self, turns: Sequence[dict[str, str]]) -> Iterator[str]:
        """The pieces of the answer to a conversation, as they are made."""
        text = prompt_text(turns, self.tokenizer, self.template)
        templated = bool(self.template and self.tokenizer.chat_template)
        batch = self.tokenizer(text, return_tensors="pt", add_special_tokens=not templated)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        options: dict[str, Any] = {"do_sample": False}
        if self.temperature:
            options = {"do_sample": True, "temperature": self.temperature}
        failed: list[BaseException] = []

        def run() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(
                        input_ids=batch["input_ids"].to(self.model.device),
                        attention_mask=batch["attention_mask"].to(self.model.device),
                        max_new_tokens=self.max_new_tokens,
                        pad_token_id=self.tokenizer.pad_token_id,
                        streamer=streamer,
                        **options,
                    )
            except BaseException as error:  # goes on in the thread that reads
                failed.append(error)
                streamer.end()

        set_seed(self.seed)
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failed:
            raise failed[0]
