"""Run in vLLM's environment: run requests with adapters in one batch, write the top tokens."""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    question = json.loads(Path(sys.argv[1]).read_text())
    names = list(question["adapters"])
    llm = LLM(
        question["base"],
        dtype="float32",
        enable_lora=True,
        max_lora_rank=question["rank"],
        max_loras=len(names) + 1,  # on a CPU, rows without an adapter use the last slot
        max_model_len=256,
        max_logprobs=question["count"],
        enforce_eager=True,
    )
    loras = {
        name: LoRARequest(name, i + 1, question["adapters"][name]) for i, name in enumerate(names)
    }
    answers = llm.generate(
        [{"prompt_token_ids": each["tokens"]} for each in question["requests"]],
        SamplingParams(temperature=0.0, max_tokens=1, logprobs=question["count"]),
        lora_request=[loras.get(each["adapter"]) for each in question["requests"]],
    )
    told = [
        {token: each.logprob for token, each in answer.outputs[0].logprobs[0].items()}
        for answer in answers
    ]
    Path(sys.argv[2]).write_text(json.dumps(told))
