"""Run in llama.cpp's environment: read a ``llama-server`` command and requests, write top tokens.

No Python package contains the program, but xllamacpp contains its server as a library. The script
passes the command's arguments to the library.
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
# llama.cpp's threads spin while they wait, which would dominate for such short prompts.
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
# Exact cache and attention: float16 differences are not the subject.
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
