"""Dense float64 reference of what the package must compute. It shares no code with the package.

Shapes: A (r-k, in), B (out, r-k), d (R,), pool A (L*k, in), pool B (out, L*k), R = r-k + L*k.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Adapter(NamedTuple):
    """The tensors of one adapted layer. Pool tensors are None if k = 0; d = None means ones."""

    A: Tensor
    A_pool: Tensor | None
    B: Tensor
    B_pool: Tensor | None
    d: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Adapter:
        return Adapter(*(None if value is None else function(value) for value in self))

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return [A ; A_pool] (R, in), [B | B_pool] (out, R) and d (R,) in float64."""
        A, A_pool, B, B_pool, d = self.map(lambda t: t.detach().double())
        if A_pool is not None:
            A, B = torch.cat([A, A_pool]), torch.cat([B, B_pool], 1)
        return A, B, A.new_ones(len(A)) if d is None else d


def delta(adapter: Adapter) -> Tensor:
    """Compute dW = [B | B_pool] diag(d) [A ; A_pool], (out, in)."""
    down, up, d = adapter.stacked()
    return up @ torch.diag(d) @ down


def differentiable_delta(adapter: Adapter) -> Tensor:
    """Compute ``delta`` in the adapter's dtype, with grad. There is a pool, and a d."""
    down, up = torch.cat([adapter.A, adapter.A_pool]), torch.cat([adapter.B, adapter.B_pool], 1)
    return (up * adapter.d) @ down


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> Tensor:
    y = x.double() @ (weight.double() + delta(adapter)).T
    return y if bias is None else y + bias.double()


def of_experts(factors: Sequence[Tensor | None]) -> list[Adapter]:
    """Split stacked factors (A, A_pool, B, B_pool, d) into one adapter for each expert.

    A pool may be shared by all experts (2-D) or stacked, one for each expert (3-D).
    """
    A, A_pool, B, B_pool, d = factors
    pools = [(A_pool, B_pool)] * len(A)
    if A_pool is not None and A_pool.dim() == 3:
        pools = list(zip(A_pool, B_pool, strict=True))
    own = zip(A, B, d, pools, strict=True)
    return [Adapter(a, pool[0], b, pool[1], scale) for a, b, scale, pool in own]


def stacked_weight(weight: Tensor, adapter: Adapter) -> Tensor:
    """Compute W[e] + dW[e] (E, out, in) of stacked experts, differentiable."""
    changed = []
    for matrix, (A, A_pool, B, B_pool, d) in zip(weight, of_experts(adapter), strict=True):
        if A_pool is not None:
            A, B = torch.cat([A, A_pool]), torch.cat([B, B_pool], 1)
        changed.append(matrix + B @ torch.diag(d) @ A)
    return torch.stack(changed)


def experts(
    x: Tensor, chosen: Tensor, shares: Tensor, up: tuple, down: tuple, act, norm=lambda z: z
) -> Tensor:
    """Compute y[t] = sum_k shares[t, k] norm(W2[e] act(W1[e] x[t] + b1[e]) + b2[e]).

    e is chosen[t, k]. ``up`` and ``down`` are (W (E, out, in), bias (E, out) or None). ``act`` and
    ``norm`` take rows.
    """
    (W1, b1), (W2, b2) = up, down
    y = x.new_zeros(len(x), W2.shape[1])
    for t, k in itertools.product(*map(range, chosen.shape)):
        e = int(chosen[t, k])
        h = act((W1[e] @ x[t] + (0 if b1 is None else b1[e]))[None])[0]
        z = W2[e] @ h + (0 if b2 is None else b2[e])
        y[t] = y[t] + shares[t, k] * norm(z[None])[0]
    return y


def linear_grads(grad: Tensor, x: Tensor, weight: Tensor, adapter: Adapter) -> dict[str, Tensor]:
    """Compute gradients of x (M, in) and the adapter from ``grad`` (M, out), without forming dW."""
    down, up, d = adapter.stacked()
    G, X = grad.double(), x.double()
    U, H = X @ down.T, G @ (up * d)
    T = G.T @ U
    return {
        "x": G @ weight.double() + H @ down,
        **_split(H.T @ X, T * d, (up * T).sum(0), adapter.A.shape[0]),
    }


def adapter_grads(weight_grad: Tensor, adapter: Adapter) -> dict[str, Tensor]:
    """Compute the adapter's gradients from S = dL/dW, by T = S [A ; A_pool]^T."""
    down, up, d = adapter.stacked()
    S = weight_grad.double()
    T = S @ down.T
    return _split((up * d).T @ S, T * d, (up * T).sum(0), adapter.A.shape[0])


def _split(down: Tensor, up: Tensor, d: Tensor, own: int) -> dict[str, Tensor]:
    return {
        "A": down[:own],
        "A_pool": down[own:],
        "B": up[:, :own],
        "B_pool": up[:, own:],
        "d": d,
    }


def _without(name: str) -> list[str]:
    return ["*" if part.isdecimal() else part for part in name.split(".")]


def groups(shapes: Mapping[str, tuple[int, int]]) -> list[list[str]]:
    """List the groups of layer names that share a pool.

    Layers are in one group if their (out, in) are equal, and their paths are equal after the first
    integer is masked in which some path differs that is equal without integers.
    """
    found: dict[tuple, list[str]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        like = [other.split(".") for other in shapes if _without(other) == _without(name)]
        where = [i for i, part in enumerate(parts) if part.isdecimal()]
        varying = [i for i in where if any(other[i] != parts[i] for other in like)]
        for i in (varying or where)[:1]:
            parts[i] = "*"
        found.setdefault((tuple(parts), tuple(shape)), []).append(name)
    return list(found.values())


def initial_d(
    rank: int, k: int, layers: int, index: int, alpha: float, start: str = "lora"
) -> Tensor:
    """Return d (R,) of a layer at the start: private ranks, then pool ranks.

    Like LoRA's scale: alpha / r on private ranks and on the k that the layer gave, alpha / r / L on
    those of others. As in the official code: alpha / 2 / (r - k), and alpha / 2 / (L k), even if
    k = r, but alpha / r without a pool.
    """
    if start == "paper" and k:
        own, pooled = [alpha / 2 / max(rank - k, 1)], [alpha / 2 / (layers * k)] * layers
    else:
        own, pooled = (
            [alpha / rank],
            [alpha / rank / (1 if i == index else layers) for i in range(layers)],
        )
    return torch.tensor(own * (rank - k) + [x for x in pooled for _ in range(k)]).double()


def trainable_count(shapes: Mapping[str, tuple[int, int]], rank: int, k: int) -> int:
    """Count trainable parameters: L*r*(in+out) + L*R, summed over the groups."""
    total = 0
    for names in groups(shapes):
        layers, (out, width) = len(names), shapes[names[0]]
        total += layers * rank * (width + out) + layers * (rank - k + layers * k)
    return total


def is_transposed(module: nn.Module) -> bool:
    """Return whether the module stores the weight as (in, out)."""
    return type(module).__name__ == "Conv1D"


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """Return (out, in), however the module stores the weight."""
    first, second = module.weight.shape
    return (second, first) if is_transposed(module) else (first, second)


def merged_weight(module: nn.Module, adapter: Adapter) -> Tensor:
    """Compute W + dW in float64, in the module's own layout."""
    change = delta(adapter)
    return module.weight.detach().double() + (change.T if is_transposed(module) else change)


class AllInFloat64(TorchFunctionMode):
    """A mode that replaces float32 by float64 in the arguments of every call.

    Models use float32 in norms, rotary tables and softmax whatever the model's dtype, which would
    leave a float64 reference with float32 errors.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(v is torch.float32 for v in (*args, *kwargs.values())):
            args = [torch.float64 if v is torch.float32 else v for v in args]
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        return function(*args, **kwargs)


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Compute everything in float64, also what models compute in float32."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with AllInFloat64():
            yield
    finally:
        torch.set_default_dtype(usual)


@torch.no_grad()
def rounding(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> float:
    """Return the largest error of a plain model's output in its own dtype, from float64.

    The tolerance for a model that computes the same function is a multiple of it: processors round
    differently. ``model`` must share no code with the package.
    """
    wide = copy.deepcopy(model).double()
    config = getattr(wide, "config", None)
    if getattr(config, "_experts_implementation", None):
        config._experts_implementation = "eager"  # grouped_mm has no float64
    with in_float64():
        exact = call(wide)
    return (call(model) - exact).abs().max().item()


def assert_close(found: Tensor, expected: Tensor, error: float, times: float = 8) -> None:
    """Assert that two results agree to a multiple of ``error``, plain PyTorch's own."""
    off, limit = (found.double() - expected.double()).abs().max().item(), times * error
    assert off <= limit


def dense_model(
    base: nn.Module, adapters: Mapping[str, Adapter], model: nn.Module | None = None
) -> nn.Module:
    """Return a float64 copy of the plain model ``base`` with weights W + dW.

    If ``model`` is an earlier copy, replace the weights in that instead.
    """
    if model is None:
        model = copy.deepcopy(base).double()
        model.requires_grad_(False)
    for name, adapter in adapters.items():
        module = model.get_submodule(name)
        module.weight = nn.Parameter(merged_weight(base.get_submodule(name), adapter))
    return model


def model_gradients(model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Compute adapter gradients from the gradients of the dense model's weights.

    Keys are ``<layer>.A`` and so on. Pool gradients are summed over the layers of a group, with the
    group's first layer in the key.
    """
    shapes, found = {}, {}
    for name, adapter in adapters.items():
        module = model.get_submodule(name)
        S = module.weight.grad.T if is_transposed(module) else module.weight.grad
        shapes[name] = weight_shape(module)
        found[name] = adapter_grads(S, adapter)
    result = {f"{name}.{field}": found[name][field] for name in found for field in ("A", "B", "d")}
    for names in groups(shapes):
        if adapters[names[0]].A_pool is not None:
            for field in ("A_pool", "B_pool"):
                result[f"{names[0]}.{field}"] = sum(found[name][field] for name in names)
    return result


def run_model(
    base: nn.Module,
    adapters: Mapping[str, Adapter],
    loss: Callable[[nn.Module], tuple[Tensor, Tensor]],
    model: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Return the float64 dense model's logits (key ``logits``) and every adapter gradient.

    ``model`` is an earlier copy, as in ``dense_model``.
    """
    model = dense_model(base, adapters, model)
    with in_float64():
        logits, value = loss(model)
        value.backward()
    return {"logits": logits.detach(), **model_gradients(model, adapters)}


def official_tensors(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Return the tensors of an official checkpoint, for layers ``<prefix>layers.N.<path>``."""
    tensors = {}
    for name, adapter in adapters.items():
        path = name.split("layers.")[1].split(".", 1)[1].replace(".", "__")
        key = f"base_model.model.{name}.rasa_"
        tensors[f"{key}A.weight"] = adapter.A
        tensors[f"{key}B.weight"] = adapter.B
        tensors[f"{key}mixing.weight"] = adapter.d
        if adapter.A_pool is not None:
            tensors[f"base_model.rasa_shared_A.{path}.weight"] = adapter.A_pool
            tensors[f"base_model.rasa_shared_B.{path}.weight"] = adapter.B_pool
    return {key: value.detach().clone().contiguous() for key, value in tensors.items()}


def write_official(
    directory: Path,
    tensors: Mapping[str, Tensor],
    *,
    rank: int,
    k: int,
    alpha: float,
    target_modules: list[str],
    pickled: bool = False,
) -> Path:
    """Write a checkpoint directory like the official code, and return ``directory``."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    if pickled:
        torch.save(dict(tensors), directory / "adapter_model.bin")
    else:
        save_file(dict(tensors), directory / "adapter_model.safetensors", {"format": "pt"})
    config = {
        **dict.fromkeys(("auto_mapping", "layers_pattern", "layers_to_transform")),
        **dict.fromkeys(("modules_to_save", "revision")),
        "base_model_name_or_path": "some/model",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "peft_type": "RASA",
        "r": rank,
        "rasa_alpha": alpha,
        "rasa_dropout": 0.05,
        "rasa_k": k,
        "target_modules": target_modules,
        "task_type": "CAUSAL_LM",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return directory
