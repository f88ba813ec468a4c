"""Run in vLLM's environment, with the plug-in: batches of requests, then loads and unloads.

The engine runs in this process, so that its memory and its buffers can be measured.
"""

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def resident() -> int:
    """Return the bytes of memory that this process holds, without what is free to be reused."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def slot(llm) -> int:
    """Return the bytes of one slot's buffers for linear layers."""
    worker = llm.llm_engine.model_executor.driver_worker.worker
    manager = worker.model_runner.lora_manager._adapter_manager
    linears = [m for m in manager.modules.values() if hasattr(m, "output_slices")]
    pools = getattr(manager, "rasa_pools", None)
    stacks = [s for m in linears for s in (m.lora_a_stacked, m.lora_b_stacked)]
    stacks += [s for pair in pools.buffers.values() for s in pair] if pools else []
    d = [m.rasa_d[:, 0] for m in linears] if pools else []
    return sum(t[0].nbytes for stack in stacks for t in stack) + sum(t.nbytes for t in d)


if __name__ == "__main__":
    question = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(
        question["base"],
        dtype="float32",
        enable_lora=True,
        max_lora_rank=question["rank"],
        max_loras=question["slots"],
        max_model_len=128,
        max_logprobs=question["count"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        tensor_parallel_size=question.get("tensor_parallel", 1),
    )
    adapters = question["adapters"]
    loras = {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(adapters.items(), 1)}
    sampling = SamplingParams(
        temperature=0.0, max_tokens=1, logprobs=question["count"], detokenize=False
    )
    told = []
    for requests in question["batches"]:
        answers = llm.generate(
            [{"prompt_token_ids": tokens} for _, tokens in requests],
            sampling,
            lora_request=[loras.get(name) for name, _ in requests],
            use_tqdm=False,
        )
        first = (answer.outputs[0].logprobs[0] for answer in answers)
        told.append(
            [{token: each.logprob for token, each in logprobs.items()} for logprobs in first]
        )
    refused = {}
    for i, (name, path) in enumerate(question["refused"].items(), 100):
        try:
            llm.llm_engine.add_lora(LoRARequest(name, i, path))
        except Exception as error:  # of any kind: what a client is told
            refused[name] = str(error)
    memory = []
    for i in range(question["loads"]):
        llm.llm_engine.add_lora(LoRARequest(f"load {i}", 1000 + i, next(iter(adapters.values()))))
        llm.llm_engine.remove_lora(1000 + i)
        memory.append(resident())
    found = {"told": told, "refused": refused, "memory": memory}
    if question.get("tensor_parallel", 1) == 1:  # else its workers are processes
        found["slot"] = slot(llm)
    Path(sys.argv[2]).write_text(json.dumps(found))
