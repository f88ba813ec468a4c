"""Run in llama.cpp's environment: ``llama-server``'s words, requests in, the likeliest tokens out.

The program itself is in no package; its server is, as a library, which is given what the words of
the command say.
"""

import argparse
import json
import sys
from pathlib import Path

import xllamacpp

question = json.loads(Path(sys.argv[1]).read_text())
server = argparse.ArgumentParser(allow_abbrev=False)
server.add_argument("-m", required=True)
server.add_argument("--lora", action="append", default=[])
server.add_argument("--cache-ram", type=int, default=8192)
words = server.parse_args(question["words"])

params = xllamacpp.CommonParams()
params.model.path = words.m
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in words.lora]
params.cache_ram_mib = words.cache_ram
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 1024, 1, 0, False
# Threads of llama.cpp wait for each other by spinning: for prompts this short that is most of it.
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
# The exact ones, where the differences of float16 are not the subject.
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
running = xllamacpp.Server(params)


def ask(request):
    told = running.handle_completions(
        {
            "prompt": request["tokens"],
            "n_predict": 1,
            "n_probs": request["count"],
            "logprobs": request["count"],
            "temperature": 0.0,
            **({"lora": request["lora"]} if "lora" in request else {}),
        }
    )
    told = json.loads(told) if isinstance(told, str) else told
    if "choices" not in told:
        raise SystemExit(f"llama.cpp: {told}")
    (first,) = told["choices"][0]["logprobs"]["content"]
    return {each["id"]: each["logprob"] for each in first["top_logprobs"]}


Path(sys.argv[2]).write_text(json.dumps([ask(request) for request in question["requests"]]))
