"""Time a training step of a whole SmolLM2-135M under each method and of the frozen base.

    python -m research.benchmarks.methods [--dtype D] [--rounds 7] [--tokens 160] [--json FILE]

A step is forward and backward (no optimizer) of a batch of 2, with all linear layers adapted and
random weights. "RaSA, pruned" is RaSA with gates on its pool, in which every layer uses 8 of the
pool's 30 slots, drawn at random; real training may leave other numbers. "kept" is the memory that a
forward stores for the backward, without parameters, minus that of the frozen base.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import rasa_ext
from benchmarks import baselines, harness, records
from benchmarks.model import base_model, stepper
from rasa_ext.methods import AdapterConfig, LoraConfig
from rasa_research import methods, training

SLOTS = 8
CONFIGS: dict[str, AdapterConfig | None] = {
    "frozen": None,
    "LoRA": LoraConfig(8),
    "LoRA-FA": LoraConfig(8, train_A=False),
    "Block-LoRA, 2 blocks": methods.BlockLoraConfig(8, blocks=2),
    "SBoRA, side A": methods.SboraConfig(8, side="A"),
    "SBoRA, side B": methods.SboraConfig(8, side="B"),
    "SoRA": methods.SoraConfig(8),
    "ResLoRA, window 3": methods.ResLoraConfig(8, window=3),
    "RaSA, k = 1": rasa_ext.RasaConfig(8, 1),
    "RaSA, pruned": methods.GatedRasaConfig(8, 1),
}


def build(name: str, base: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    model, config = baselines.sharing_copy(base), CONFIGS[name]
    if config is None:
        return model.train()
    rasa_ext.patch_model(model, config=config)
    with torch.no_grad():
        for parameter in rasa_ext.adapter_parameters(model):
            parameter.add_(0.02 * torch.randn(parameter.shape))
        if name == "RaSA, pruned":
            for layer in layers(model):
                pooled = layer.d[layer.A.shape[0] :]
                pooled[torch.randperm(len(pooled))[SLOTS:]] = 0.0
            training.prune(model)
    return model.train()


def layers(model: nn.Module) -> list[rasa_ext.RasaLinear]:
    return [module for module in model.modules() if isinstance(module, rasa_ext.RasaLinear)]


def kept(model: nn.Module, ids: torch.Tensor) -> float:
    """Return the MiB that a forward stores for the backward, without the model's own tensors.

    Each storage counts once.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    total = sum(found.values()) / 2**20
    del loss
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    harness.pin_allocator()
    base = base_model(getattr(torch, arguments.dtype))
    models = {name: build(name, base) for name in CONFIGS}
    ids = torch.randint(0, 49152, (2, arguments.tokens))
    steps = {name: stepper(model, ids) for name, model in models.items()}
    sizes = {name: kept(model, ids) for name, model in models.items()}
    seconds = harness.interleaved(steps, arguments.rounds)
    floor = harness.quartiles(seconds["frozen"])[1]
    rows = []
    for name, model in models.items():
        low, middle, high = harness.quartiles(seconds[name])
        rows.append(
            {
                "method": name,
                "R": max((layer.effective_rank for layer in layers(model)), default=0),
                "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "ms (quartiles)": f"{1e3 * middle:.0f} ({1e3 * low:.0f}-{1e3 * high:.0f})",
                "/ frozen": round(middle / floor, 3),
                "kept, MiB": round(sizes[name] - sizes["frozen"], 1),
            }
        )
    print(f"{arguments.dtype}, 2 x {arguments.tokens} tokens, {harness.machine()}")
    print(records.table(rows))
    if arguments.json:
        head = records.environment("cpu")
        records.write_json(arguments.json, {"machine": head, "rows": rows})


if __name__ == "__main__":
    main()
