"""Run in vLLM's environment: class probabilities of one prompt with each adapter."""

import json
import sys
from pathlib import Path

from vllm import LLM
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    question = json.loads(Path(sys.argv[1]).read_text())
    adapters = question["adapters"]
    llm = LLM(
        question["base"],
        runner="pooling",
        dtype="float32",
        enable_lora=True,
        max_lora_rank=8,
        max_loras=len(adapters) + 1,
        max_model_len=128,
        enforce_eager=True,
        skip_tokenizer_init=True,
    )
    loras = [None, *(LoRARequest(name, i, adapters[name]) for i, name in enumerate(adapters, 1))]
    prompts = [{"prompt_token_ids": question["tokens"]} for _ in loras]
    answers = llm.classify(prompts, lora_request=loras, use_tqdm=False)
    told = dict(zip(["base", *adapters], (answer.outputs.probs for answer in answers), strict=True))
    Path(sys.argv[2]).write_text(json.dumps(told))
