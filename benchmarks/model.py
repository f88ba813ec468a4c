"""A training step of a whole SmolLM2-135M: frozen base, PEFT LoRA, the official formula, ours.

    python -m benchmarks.model [--dtype float32 bfloat16] [--rounds 15] [--json FILE] [--seconds S]
                               [--beside "peft r=8" "ours alone" ...] [--layers 3] [--length 8]

A step is forward and backward (no optimizer) of batch 2 x 160 tokens with all linear layers
adapted. The weights are random, with SmolLM2-135M's shapes; this does not change the time. "ours
alone" computes every layer separately, even layers that read the same input. Peak memory is
measured in a separate process for each variant, above the memory before the first step.

With ``--layers``, a step covers only that many of the 30 decoder layers, and no head. More rounds
then fit into a minute, and the machine drifts less within a round. The pools keep the size for 30
layers.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import rasa_ext
from benchmarks import baselines, harness, records

VARIANTS = ("frozen", "peft r=8", "peft r=37", "official", "ours alone", "ours")
COMPARED = ("frozen", "official", "ours")
LAYERS = 30


def base_model(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(dtype).requires_grad_(False)


def build(name: str, base: LlamaForCausalLM):
    """Build one variant over the base's own parameters, in training mode."""
    torch.manual_seed(1)
    model = baselines.sharing_copy(base)
    if name.startswith("peft"):
        rank = int(name.rpartition("=")[2])
        model = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
        )
    elif name != "frozen":
        baselines.lively(rasa_ext.patch_model(model, rank=8, k=1))
        if name == "official":
            baselines.swap(model, baselines.OfficialLinear)
        elif name == "ours alone":
            for module in model.modules():
                if isinstance(module, rasa_ext.RasaLinear):
                    module.fused = None
    return model.train()


def shortened(model, ids: torch.Tensor, layers: int):
    """Cut the model to the first decoder layers, and return a function that runs a step of them."""
    body = model.get_decoder()
    body.layers, body.norm = body.layers[:layers], nn.Identity()
    x = torch.randn(*ids.shape, body.config.hidden_size, dtype=model.dtype)
    grad = torch.randn_like(x)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        hidden = body(inputs_embeds=x.detach().requires_grad_(), use_cache=False)
        hidden.last_hidden_state.backward(grad)

    return step


def stepper(model, ids: torch.Tensor):
    """Return a step function; embeddings require grad, so that all variants share one floor."""
    model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_())

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item()

    return step


def verify(models: dict, ids: torch.Tensor) -> None:
    """Exit with an error unless ours and the official formula compute the same logits."""
    with torch.no_grad():
        mine, theirs = (models[n](input_ids=ids).logits for n in ("ours", "official"))
    error = ((mine - theirs).norm() / theirs.norm()).item()
    limit = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[mine.dtype]
    if error > limit:
        raise SystemExit(f"ours and official differ by {error:.2e}, more than {limit}")
    print(f"verified: ours and official agree to {error:.1e} (relative)")


def tokens(length: int) -> torch.Tensor:
    return torch.randint(0, 49152, (2, length), generator=torch.Generator().manual_seed(1))


def peak_of(name: str, dtype: torch.dtype, ids: torch.Tensor) -> None:
    """Print the MiB that the first steps of one variant add to this process."""
    model = build(name, base_model(dtype))
    step = stepper(model, ids)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # Building the model peaked higher; "5" resets the kernel's high-water mark.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    for _ in range(3):
        step()
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    """Return MiB of this process (Linux): VmRSS is the current value, VmHWM the maximum."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def memory(name: str, dtype: str, length: int) -> float:
    command = [sys.executable, "-m", "benchmarks.model", "--peak", name, "--dtype", dtype]
    command += ["--length", str(length)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def report(
    dtype: str,
    names: Sequence[str],
    layers: int | None,
    length: int,
    rounds: int,
    seconds_left: float,
) -> list[dict]:
    """Print a table and return the rows; the rounds take at most ``seconds_left``."""
    base = base_model(getattr(torch, dtype))
    models = {name: build(name, base) for name in names}
    print(f"\n{dtype}, {harness.machine()}")
    ids = tokens(length)
    verify(models, ids)
    steps = {
        name: shortened(model, ids, layers) if layers else stepper(model, ids)
        for name, model in models.items()
    }
    seconds = harness.interleaved(steps, rounds, at_most=seconds_left)
    floor = harness.quartiles(seconds["frozen"])[1]
    print(f"{'variant':10} {'ms':>8} {'quartiles':>17} {'/frozen':>8} {'peak MiB':>9}")
    rows = []
    for name in names:
        low, middle, high = (1e3 * v for v in harness.quartiles(seconds[name]))
        over, peak = middle / floor / 1e3, None if layers else round(memory(name, dtype, length))
        print(
            f"{name:10} {middle:8.1f} {f'{low:.1f} - {high:.1f}':>17} {over:8.3f} {peak or '':>9}",
            flush=True,
        )
        row = {"dtype": dtype, "variant": name, "ms": (low, middle, high)}
        row |= {"rounds": len(seconds[name]), "over_frozen": over, "peak_mib": peak}
        rows.append(row)
    ratio = harness.overhead_ratio(seconds, "ours", "official", "frozen")
    low, high = harness.overhead_interval(seconds, "ours", "official", "frozen")
    print(f"(ours - frozen) / (official - frozen) = {ratio:.3f}, 90 %: {low:.3f} to {high:.3f}")
    return [*rows, {"dtype": dtype, "ratio": ratio, "ratio_90": (low, high)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--beside",
        nargs="*",
        choices=VARIANTS,
        default=VARIANTS,
        help="variants to time beside frozen, official and ours; default: all",
    )
    parser.add_argument("--layers", type=int, help="time only so many decoder layers, and no head")
    parser.add_argument("--length", type=int, default=160, help="tokens of each of the two rows")
    parser.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--seconds", type=float, default=math.inf, help="time limit for all dtypes")
    arguments = parser.parse_args()
    harness.pin_allocator()
    if arguments.peak:
        peak_of(arguments.peak, getattr(torch, arguments.dtype[0]), tokens(arguments.length))
        return
    if arguments.layers is not None and not 1 <= arguments.layers <= LAYERS:
        parser.error(f"--layers: expected 1 to {LAYERS}, got {arguments.layers}")
    names = [name for name in VARIANTS if name in (*COMPARED, *arguments.beside)]
    budget, rows = records.Budget(arguments.seconds), []
    for index, dtype in enumerate(arguments.dtype):
        # If memory is measured, the processes that measure it get about half of the time.
        share = budget.share(len(arguments.dtype) - index) / (1 if arguments.layers else 2)
        rows += report(dtype, names, arguments.layers, arguments.length, arguments.rounds, share)
        if arguments.json:
            head = records.environment("cpu")
            records.write_json(arguments.json, {"machine": head, "rows": rows})


if __name__ == "__main__":
    main()
