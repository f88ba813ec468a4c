"""The linears of one decoder layer in every compared variant, all over the same weights."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor, nn

import rasa_ext
from benchmarks import baselines, harness, records
from benchmarks.shapes import Block
from rasa_ext import ops
from rasa_ext.nn.fused_projections import FusedProjections


class Linears(nn.Module):
    """A block's linears side by side; linears with the same ``reads`` get the same tensor."""

    def __init__(self, block: Block, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.reads = {linear.name: linear.reads for linear in block.linears}
        self.projections = nn.ModuleDict(modules)

    def forward(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Map inputs (M, in), by what is read, to outputs (M, out) in the block's order."""
        return [module(inputs[self.reads[name]]) for name, module in self.projections.items()]


class Absent(nn.Module):
    """A variant that could not be built; a call raises the reason."""

    def __init__(self, why: Exception) -> None:
        super().__init__()
        self.why = why

    def forward(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        raise self.why


class Case:
    """Inputs, upstream gradients and variants of a block at one M and one rank."""

    def __init__(
        self,
        block: Block,
        M: int,
        rank: int,
        k: int,
        dtype: torch.dtype,
        device: str,
        dropout: float = 0.0,
    ) -> None:
        torch.manual_seed(0)
        self.block, self.M, self.rank, self.k = block, M, rank, k
        self.R = block.effective_rank(rank, k)
        self.dtype, self.device, self.dropout = dtype, device, dropout
        # Without the kernels, the name must show that these are not their times.
        self.ours = "ours (PyTorch)" if records.kernels_missing(device) else "ours"
        self.weights = {
            each.name: self._random(each.out_features, each.in_features).div_(each.in_features**0.5)
            for each in block.linears
        }
        widths = {each.reads: each.in_features for each in block.linears}
        self.inputs = {name: self._random(M, n).requires_grad_() for name, n in widths.items()}
        self.grads = [self._random(M, each.out_features) for each in block.linears]
        self.adapted = {name: self._ours(base) for name, base in self._frozen().items()}
        self.compiled: nn.Module | None = None

    def variants(self, compiled: bool = False) -> dict[str, Linears | nn.Module]:
        """Build frozen, official, addmm, PEFT LoRA at r = 8 and r = R, and ours; compiled if asked.

        Ours is built twice: projections of one input are fused or separate by default, and the
        other way.
        """
        official = {name: baselines.OfficialLinear(m) for name, m in self.adapted.items()}
        made: dict[str, nn.Module] = {
            "frozen": Linears(self.block, self._frozen()),
            "official": Linears(self.block, official),
            "addmm": Linears(
                self.block, {n: baselines.AddmmLinear(m) for n, m in self.adapted.items()}
            ),
        }
        ours = made[self.ours] = Linears(self.block, self.adapted)
        for reads in self.inputs:
            same = [each.name for each in self.block.linears if each.reads == reads]
            fused = FusedProjections([self.adapted[name] for name in same])
            for name in same:
                self.adapted[name].fused = fused
        first = next(iter(self.inputs.values()))
        by_default = ops.fuse_projections(first)
        if self.device.startswith("cuda"):  # as by default, without the kernels of skinny.cuh
            made[f"{self.ours}, cublas"] = baselines.Cublas(ours)
        name = f"{self.ours}, {'each alone' if by_default else 'fused'}"
        made[name] = baselines.Alone(ours, not by_default)
        for rank in (8, self.R):
            made[f"peft r={rank}"] = self.peft(rank)
        if compiled:
            made["compiled"] = torch.compile(Linears(self.block, official), dynamic=False)
        return made

    def adapter_rank(self, variant: str) -> int:
        """Return the rank in a variant's computation, for its roofline."""
        if variant == "frozen":
            return 0
        return int(variant.partition("=")[2]) if variant.startswith("peft") else self.R

    def step(self, module: nn.Module):
        """Return a function that runs forward and backward after it drops gradients.

        The official formula's pools keep their gradients: in a model these are sums over layers,
        and adding them up is part of each layer's step. Ours are summed once for all layers. Here
        each linear is packed separately, so ours has a whole launch for its share of a group's
        launch.
        """
        official = (m for m in module.modules() if isinstance(m, baselines.OfficialLinear))
        pools = {id(pool) for each in official for pool in (each.A_pool, each.B_pool)}
        trained = [tensor for tensor in self._trained(module) if id(tensor) not in pools]

        def run() -> list[Tensor]:
            for tensor in trained:
                tensor.grad = None
            with _environment(module):
                torch.autograd.backward(module(self.inputs), self.grads)
            return [tensor.grad for tensor in trained if tensor.grad is not None]

        return run

    def drop_gradients(self, module: nn.Module) -> None:
        """Reset gradients to None, as before the first step."""
        for tensor in self._trained(module):
            tensor.grad = None

    def forward(self, module: nn.Module):
        """Return a function that runs M sequences' step of one token, which packs nothing."""
        step = {name: x[:, None] for name, x in self.inputs.items()}

        def run() -> list[Tensor]:
            with torch.no_grad():
                return module(step)

        return run

    def verify(self, variants: dict[str, nn.Module]) -> None:
        """Raise RuntimeError if ``failures`` returns any."""
        for name, why in self.failures(variants).items():
            raise RuntimeError(f"{name}: {why}")

    def failures(self, variants: dict[str, nn.Module]) -> dict[str, str]:
        """Return, by name, why variants raise or do not compute the right function.

        All variants except frozen, PEFT and compiled compute one function; the first of them, in
        float64, is the reference. Rounding alone may put it off by more than the usual limit, for
        one token in half precision: then twice that is allowed. They are compared without dropout,
        since each draws a mask of its own.
        """
        usual, found = 2e-5 if self.dtype == torch.float32 else 3e-2, {}
        reference, exact, limits = "", {}, {}
        for name, module in variants.items():
            if name == "compiled":  # checking it would compile it more than once
                continue
            try:
                if name.startswith(("frozen", "peft")):
                    self.step(module)()
                    continue
                answers = self._answers(module.eval())
                module.train()
                if not exact:
                    reference, exact = name, self._exact(module)
                errors = {k: harness.relative_error(v, exact[k]) for k, v in answers.items()}
                limits = limits or {key: max(usual, 2 * error) for key, error in errors.items()}
                for key, error in errors.items():
                    if not error <= limits[key]:
                        found[name] = f"differs from {reference} in {key} by {error:.2e}"
                        break
            except Exception as error:
                found[name] = said(error)
        return found

    def _exact(self, module: nn.Module) -> dict[str, Tensor]:
        """Return a variant's answers, computed in float64."""
        before = self.inputs, self.grads
        self.inputs = {n: x.detach().double().requires_grad_() for n, x in self.inputs.items()}
        self.grads = [grad.double() for grad in self.grads]
        try:
            return self._answers(copy.deepcopy(module).double().eval())
        finally:
            self.inputs, self.grads = before

    def _answers(self, module: nn.Module) -> dict[str, Tensor]:
        """Return outputs with and without grad, and the gradients of everything they depend on."""
        self.drop_gradients(module)
        alone = self.forward(module)()
        with _environment(module):
            outputs = module(self.inputs)
            torch.autograd.backward(outputs, self.grads)
        found = {f"y of {n}": y for n, y in zip(self.adapted, outputs, strict=True)}
        found |= {f"y without grad of {n}": y for n, y in zip(self.adapted, alone, strict=True)}
        found |= {f"dx of {name}": x.grad for name, x in self.inputs.items()}
        fields = ("A", "A_pool", "B", "B_pool", "d")
        for name, factors in self._factors(module).items():
            for field, parameter in zip(fields, factors, strict=True):
                # A parameter outside the computation has no gradient, which must not count as
                # agreement.
                grad = parameter.grad
                found[f"d{field} of {name}"] = torch.zeros_like(parameter) if grad is None else grad
        self.drop_gradients(module)
        return {name: tensor.detach() for name, tensor in found.items()}

    def _factors(self, module: nn.Module) -> dict[str, tuple]:
        """Return A, A_pool, B, B_pool, d of every layer, the parameters that a variant trains."""
        made = dict(getattr(module, "projections", nn.ModuleDict()).items())
        official = {n: m for n, m in made.items() if isinstance(m, baselines.OfficialLinear)}
        return {
            name: official[name].factors() if name in official else layer.adapter().factors()
            for name, layer in self.adapted.items()
        }

    def parameters(self, module: nn.Module) -> list[Tensor]:
        """Return the module's, the adapters' and the pools' parameters; some are not registered."""
        return [*self._adapter(), *module.parameters()]

    def _adapter(self) -> list[Tensor]:
        return [tensor for layer in self.adapted.values() for tensor in layer.adapter().sources()]

    def _trained(self, module: nn.Module) -> list[Tensor]:
        return [*self.inputs.values(), *self.parameters(module)]

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def _frozen(self) -> dict[str, nn.Linear]:
        made = {}
        for name, weight in self.weights.items():
            made[name] = nn.Linear(*weight.t().shape, bias=False, device="meta")
            made[name].weight = nn.Parameter(weight, requires_grad=False)
        return made

    def _ours(self, base: nn.Linear) -> rasa_ext.RasaLinear:
        config = rasa_ext.RasaConfig(rank=self.rank, k=self.k, dropout=self.dropout)
        return _lively(baselines.one_of(base, config, self.block.layers))

    def peft(self, rank: int) -> nn.Module:
        """Build PEFT's own LoRA with adapters in the base's dtype, the faster of PEFT's ways."""
        try:
            import peft

            config = peft.LoraConfig(
                r=rank,
                lora_alpha=rank,
                lora_dropout=self.dropout,
                target_modules=list(self.weights),
            )
            made = peft.inject_adapter_in_model(config, Linears(self.block, self._frozen()))
        except Exception as error:
            return Absent(error)
        return _lively(made)


def _environment(module: nn.Module) -> contextlib.AbstractContextManager:
    """Return the context in which a module's backward runs like its forward."""
    return baselines.cublas() if isinstance(module, baselines.Cublas) else contextlib.nullcontext()


def said(error: Exception) -> str:
    """Format an error for a table cell."""
    return f"{type(error).__name__}: {error}"[:300]


def _lively(module: nn.Module) -> nn.Module:
    """Give adapters values as in training; zeros would be a special case."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return module
