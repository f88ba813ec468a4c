"""Every method over a small model, and plain modules that compute the same from its tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rasa_ext
from rasa_ext import methods, training

WIDTHS = (9, 7)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(*WIDTHS)
        self.down_proj = nn.Linear(*reversed(WIDTHS), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


def base(layers: int = 3, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(layers))).to(dtype)


def _two_tasks(**options) -> nn.Module:
    config = methods.SdLoraConfig(rank=3, adapter_dtype=torch.float64, **options)
    model = rasa_ext.patch_model(base(), config=config)
    for seed in (1, 2):
        randomize(model, seed)
        training.next_task(model)
    return model


def _boosted(config: methods.AdapterConfig) -> nn.Module:
    model = rasa_ext.patch_model(base(), config=config)
    optimizer = torch.optim.SGD(rasa_ext.adapter_parameters(model), lr=0.1)
    boosting = training.Boosting(model, optimizer, steps=1, layers=4, seed=5)
    for seed in range(3):
        randomize(model, seed)
        boosting.step()
    return model


def _pruned(config: methods.AdapterConfig) -> nn.Module:
    model = rasa_ext.patch_model(base(), config=config)
    randomize(model, 1)
    with torch.no_grad():
        for i, layer in enumerate(rasa_linears(model).values()):
            layer.d[i % 2 :: 2] = 0.0
    training.prune(model)
    return model


def _plain(name: str, **options) -> nn.Module:
    config = methods.method_named(name)(adapter_dtype=torch.float64, **options)
    return rasa_ext.patch_model(base(), config=config)


WIDE = {"adapter_dtype": torch.float64}
CASES = {
    "rasa": lambda: _plain("rasa", rank=4, k=1),
    "rasa, ranks": lambda: _plain("rasa", rank=4, k=1, rank_pattern={r"1\..*": 6, "up_proj": 3}),
    "rasa, gates pruned": lambda: _pruned(methods.RasaConfig(4, 1, gates="pool", **WIDE)),
    "lora": lambda: _plain("lora", rank=3),
    "rslora": lambda: _plain("lora", rank=3, rslora=True),
    "lora-fa": lambda: _plain("lora", rank=3, train_A=False),
    "boosted": lambda: _boosted(methods.LoraConfig(rank=1, alpha=1.0, **WIDE)),
    "boosted pool": lambda: _boosted(methods.BoostedPoolConfig(**WIDE)),
    "boosted pool, trained on": lambda: _boosted(
        methods.BoostedPoolConfig(rank=2, alpha=3.0, train_past=True, **WIDE)
    ),
    "block-lora": lambda: _plain("block-lora", rank=6, blocks=2),
    "sbora-fa": lambda: _plain("sbora", rank=3, side="A"),
    "sbora-fb": lambda: _plain("sbora", rank=3, side="B"),
    "sora": lambda: _plain("sora", rank=4),
    "sora, pool": lambda: _plain("sora", rank=4, k=2),
    "sora, pruned": lambda: _pruned(methods.SoraConfig(4, **WIDE)),
    "reslora": lambda: _plain("reslora", rank=2, window=1),
    "sd-lora": lambda: _two_tasks(),
    "sd-lora, a layer": lambda: _two_tasks(tied=False, norm="frobenius"),
    "sd-lora, product": lambda: _two_tasks(norm="product", rank_schedule={2: 2}),
}


def case(name: str) -> nn.Module:
    """A patched model whose adapter is far from its start."""
    model = CASES[name]()
    randomize(model, 7)
    return model


def randomize(model: nn.Module, seed: int) -> None:
    """Draw everything that is trained, about as large as keeps a layer's change at its weight's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rasa_ext.adapter_parameters(model):
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(0.4 * noise + 0.3 * (parameter.ndim == 1))


def rasa_linears(model: nn.Module) -> dict[str, rasa_ext.RasaLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, rasa_ext.RasaLinear)}


def inputs(rows: int = 5, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTHS[0], generator=generator, dtype=torch.float64)


def changes(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Each layer's dW (out, in) by the method's own formula, differentiable in its tensors."""
    kind, config = name.partition(",")[0], next(iter(rasa_linears(model).values())).config
    found = {}
    for path, layer in rasa_linears(model).items():
        t, pool, index = layer.own_tensors(), layer.pool_tensors(), layer.place.index
        if kind in ("rasa", "sora"):
            dW = (t["B"] * t["d"][: t["A"].shape[0]]) @ t["A"]
            slots = t.get("slots", range(pool["A"].shape[0] if pool else 0))
            for entry, slot in zip(t["d"][t["A"].shape[0] :], slots, strict=True):
                dW = dW + entry * torch.outer(pool["B"][:, slot], pool["A"][slot])
        elif kind in ("lora", "rslora", "lora-fa"):
            dW = config.alpha / config.rank ** (0.5 if kind == "rslora" else 1) * t["B"] @ t["A"]
        elif kind == "boosted":
            dW = t["B"] @ t["A"] + (t["stack_B"] @ t["stack_A"] if "stack_A" in t else 0)
        elif kind == "boosted pool":
            dW = (pool["B"] * t["d"]) @ pool["A"]
            for entry, a, b in zip(t["stack_d"], pool["stack_A"], pool["stack_B"].t(), strict=True):
                dW = dW + entry * torch.outer(b, a)
        elif kind == "block-lora":
            dW = config.alpha / config.rank * t["B"] @ t["A"]
        elif kind in ("sbora-fa", "sbora-fb"):
            reads = kind == "sbora-fa"
            dW = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
            for column, feature in enumerate(t["index"].tolist()):
                if reads:
                    unit = torch.eye(layer.in_features, dtype=torch.float64)[feature]
                    dW = dW + torch.outer(t["B"][:, column], unit)
                else:
                    unit = torch.eye(layer.out_features, dtype=torch.float64)[feature]
                    dW = dW + torch.outer(unit, t["A"][column])
            dW = dW * (config.alpha / config.rank)
        elif kind == "reslora":
            terms = range(max(0, index - config.window), index + 1)
            dW = sum(pool[f"B{i}"] @ pool[f"A{i}"] for i in terms) * (config.alpha / config.rank)
        else:
            m = (pool if config.tied else t)["m"]
            dW = m[-1] * t["B"] @ t["A"]
            if config.norm == "frobenius":
                dW = dW / (t["B"] @ t["A"]).norm()
            begin = 0
            for task, rank in enumerate(config.past):
                A, B = t["stack_A"][begin : begin + rank], t["stack_B"][:, begin : begin + rank]
                sizes = {
                    "none": 1.0,
                    "frobenius": (B @ A).norm(),
                    "product": B.norm() * A.norm(),
                }
                dW = dW + m[task] * (B @ A) / sizes[config.norm]
                begin += rank
        found[path] = dW
    return found


def plain_forward(model: nn.Module, deltas: dict[str, Tensor], x: Tensor) -> Tensor:
    """The model's output with dense weights W + dW, block by block."""
    for i, block in enumerate(model):
        W = {
            name: getattr(block, name).base_layer.weight + deltas[f"{i}.{name}"]
            for name in ("up_proj", "down_proj")
        }
        x = x + torch.tanh(x @ W["up_proj"].t() + block.up_proj.bias) @ W["down_proj"].t()
    return x
