"""QRaSA: SmolLM2-135M trained over a quantized base, against dense bases.

    python -m benchmarks.qrasa [--bases nf4 int8 bfloat16 float32] [--steps 8] [--batch 4]

For each base, in a separate process: bytes of the base and of the adapter (r=8, k=1, all linears),
bytes that one training step stores for the backward, the process's peak in training, seconds per
step, and the loss on held-out word problems before and after. Needs ``pip install ".[train]"
".[quantized]"`` and SmolLM2 as ``rasa-ext demo`` finds it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import rasa_ext
from benchmarks import harness
from benchmarks.batches import collate, encoded
from benchmarks.model import resident
from rasa_ext.base_layers.quantized import format_of, stored_bytes
from rasa_ext.commands.demo import INSTRUCTION
from rasa_ext.commands.models import find_smollm2, load_model, load_tokenizer
from rasa_ext.commands.problems import make_problems

BASES = ("nf4", "int8", "bfloat16", "float32")
MIB = 2**20


def nf4(linear: nn.Linear) -> nn.Module:
    """Return bitsandbytes' 4-bit layer for a linear one, computing in the linear's dtype."""
    import bitsandbytes

    size = linear.in_features, linear.out_features, linear.bias is not None
    made = bitsandbytes.nn.Linear4bit(
        *size, compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta"
    )
    made.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", module=made
    )
    made.bias = linear.bias
    return made.to(linear.weight.device)


def int8(linear: nn.Linear) -> nn.Module:
    """Return bitsandbytes' 8-bit layer for a linear one."""
    import bitsandbytes

    size = linear.in_features, linear.out_features, linear.bias is not None
    made = bitsandbytes.nn.Linear8bitLt(*size, has_fp16_weights=False, device="meta")
    made.weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False)
    made.bias = linear.bias
    return made.to(linear.weight.device)


def quantized(model: nn.Module, layer: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Quantize every linear layer of ``model`` but the head, one after the other."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is nn.Linear and name != "lm_head":
                parent._modules[name] = layer(child)
    return model


def load(base: str) -> nn.Module:
    """Load SmolLM2 over one of ``BASES``; quantized ones compute in bfloat16."""
    if base in ("float32", "bfloat16"):
        return load_model(find_smollm2(), base)
    return quantized(load_model(find_smollm2(), "bfloat16"), {"nf4": nf4, "int8": int8}[base])


def base_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights of an unpatched model, with the scales of quantized ones."""
    layers = [module for module in model.modules() if format_of(module) is not None]
    parts = (each for layer in layers for each in layer.named_parameters(recurse=False))
    inside = {id(parameter) for name, parameter in parts if name != "bias"}
    plain = (p.nbytes for p in model.parameters() if id(p) not in inside)
    return sum(plain) + sum(map(stored_bytes, layers))


def batches(tokenizer, count: int, size: int, split: str) -> list[dict[str, torch.Tensor]]:
    """Make batches of word problems with worked solutions."""
    end = tokenizer.eos_token
    rows = [
        encoded(f"{INSTRUCTION} {each.question}\n", each.working + end, tokenizer, 128)
        for each in make_problems(count * size, split=split)
    ]
    pad = tokenizer.pad_token_id
    return [collate(rows[i : i + size], pad) for i in range(0, len(rows), size)]


def kept(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Return the bytes that autograd stores in one forward: no parameters, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters() if p.is_floating_point()}
    weights |= {p.data.data_ptr() for p in model.parameters() if not p.is_floating_point()}
    storages, alive = {}, []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)  # so that no address is used twice
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(**batch)
    return sum(storages.values())


@torch.no_grad()
def loss_on(model: nn.Module, held_out: list[dict[str, torch.Tensor]]) -> float:
    """Return the mean loss on held-out batches, in training mode.

    Training mode has no dropout here, and runs the kernels of training.
    """
    return statistics.fmean(model(**batch).loss.item() for batch in held_out)


def measure(base: str, steps: int, size: int) -> dict[str, float]:
    """Measure one base, from loading to the last step."""
    model, tokenizer = load(base), load_tokenizer(find_smollm2())
    found = {"base": base_bytes(model) / MIB}
    rasa_ext.patch_model(model, rank=8, k=1).train()
    parameters = rasa_ext.adapter_parameters(model)
    found["adapter"] = sum(p.nbytes for p in parameters) / MIB
    training, held_out = batches(tokenizer, steps, size, "train"), batches(tokenizer, 4, 4, "test")
    found["before"] = loss_on(model, held_out)
    found["kept"] = kept(model, training[0]) / MIB
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    optimizer, seconds = torch.optim.AdamW(parameters, lr=3e-3), []
    for batch in training:
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    found["peak"] = resident("VmHWM")
    found["seconds"] = statistics.median(seconds)
    found["after"] = loss_on(model, held_out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--one", action="store_true", help="measure here and print JSON")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.bases[0], given.steps, given.batch)))
        return
    print(f"{harness.machine()}; MiB, {given.steps} steps of {given.batch} problems")
    print("base         base  adapter     kept  peak RSS   s/step   loss before   after")
    for base in given.bases:
        command = [sys.executable, "-m", "benchmarks.qrasa", "--one", "--bases", base]
        command += ["--steps", str(given.steps), "--batch", str(given.batch)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{base:9}" + "".join(f"{found[k]:9.1f}" for k in ("base", "adapter", "kept"))
            + f"{found['peak']:10.0f}{found['seconds']:9.2f}"
            + f"{found['before']:14.3f}{found['after']:8.3f}",
            flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
