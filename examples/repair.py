"""Fit adapters to what pruning took, before any training. python examples/repair.py

Every layer's input is known, so all layers of a group are fitted in one batched product.
"""

import copy

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rasa_ext
from rasa_ext.nn import RasaLinear, adapted_group

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXT = "The rain fell all night, and in the morning the river had risen over the lower fields. "
OTHER = "She opened the old book, found a pressed flower between two pages, and smiled."

torch.manual_seed(0)  # of the adapter
tokenizer = AutoTokenizer.from_pretrained(NAME)
dense = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.float32).eval()
pruned = rasa_ext.patch_model(copy.deepcopy(dense), rank=8, k=1, alpha=32.0)
layers = {n: m for n, m in pruned.named_modules() if isinstance(m, RasaLinear)}
groups: dict[object, list[str]] = {}
inputs: dict[str, torch.Tensor] = {}
for name, layer in layers.items():
    groups.setdefault(layer.pool, []).append(name)
    weight = layer.base_layer.weight.data
    weight[weight.abs() < weight.abs().flatten().kthvalue(weight.numel() // 4).values] = 0
    dense.get_submodule(name).register_forward_pre_hook(
        lambda module, args, name=name: inputs.update({name: args[0][0]})
    )


def loss(model: torch.nn.Module, text: str) -> float:
    """Return the loss of a token of the text."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


before = loss(dense, OTHER), loss(pruned, OTHER)
loss(dense, TEXT)  # records the inputs
for pool, names in groups.items():
    mine = [layers[name] for name in names]
    x = torch.stack([inputs[name] for name in names])  # (layers, tokens, in)
    with torch.no_grad():
        wanted = torch.stack([dense.get_submodule(name)(inputs[name]) for name in names])
    optimizer = torch.optim.AdamW(
        [pool.A, pool.B, *(p for layer in mine for p in (layer.A, layer.B, layer.d))], lr=5e-3
    )
    weights = [layer.base_layer.weight for layer in mine]
    for _ in range(40):
        A, B, d = ([getattr(layer, key) for layer in mine] for key in "ABd")
        y = adapted_group(x, weights, None, A, pool.A, B, pool.B, d)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(y, wanted).backward()
        optimizer.step()
after = loss(pruned, OTHER)
print(f"loss on another text: dense {before[0]:.3f}, pruned {before[1]:.3f} -> {after:.3f}")
rasa_ext.save_adapter(pruned, "repaired")
