"""LoraPro: LoRA-Pro around any optimizer, for adapters with and without a pool."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from rasa_ext.methods import checked_integer, checked_number
from rasa_ext.patching import unwrap
from rasa_research.optim.groups import Problem, find_groups
from rasa_research.optim.least_norm import pair_steps, pool_steps

_KEY = "lora_pro"
"""Key of the full gradients' moments in a state dict."""


class LoraPro(torch.optim.Optimizer):
    """An optimizer that replaces an adapter's gradients by LoRA-Pro's (arXiv 2407.18242).

    Autograd's gradients of A and B ignore that both change together. LoRA-Pro computes the joint
    step of A and B, and here also of the pool, with a weight change nearest to a step of full
    fine-tuning: the least-squares solution of least norm, J^+ g. It is computed from autograd's
    gradients and replaces them in ``.grad``; then ``inner`` steps. The diagonal d, and any other
    trained parameter, keeps autograd's gradient.

    For LoRA, and for any layers without a trained pool, the solution is exact, as published. For
    layers that share a pool, conjugate gradients approximate it in at most ``iterations``
    iterations; any such approximation is a descent direction.

    With ``moments="full"``, Adam's moments are moments of the full gradients, as in the paper's
    results. This needs two float32 matrices of shape (out, in) for each adapted weight, as much as
    full fine-tuning: 56 GB for the linear layers of Llama-3.1-8B. The factors step by the solution
    for Adam's direction; ``inner`` steps other parameters. ``"factors"`` only needs the moments of
    ``inner``, but an ``inner`` that rescales each entry, such as Adam, undoes part of the
    adjustment.

    Clip gradients before the step, as usual: this clips autograd's gradients. Works with
    GradScaler, learning-rate schedulers, DistributedDataParallel, and transformers' Trainer
    (``optimizers=(optimizer, None)``). Make the optimizer after ``patch_model``.

    Args:
        model: a model with adapters of this package: patched, loaded, or from ``rasa_ext.peft``.
        inner: a class of ``torch.optim``.
        params: parameters to optimize, in any form that ``inner`` accepts, such as groups with
            separate learning rates; defaults to every parameter that requires a gradient.
        ridge: added to J^T J, relative to the mean of the diagonal. It suppresses directions that
            the factors hardly reach, in which rounding errors of gradients would grow: use 1e-4 for
            gradients computed in bfloat16.
        iterations: the largest number of conjugate-gradient iterations, for layers with a pool.
        tolerance: stop them when the residual's norm is at most this fraction of the gradient's.
        moments: "factors" or "full".
        inner_options: options of ``inner``: lr, betas, ...

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given; with
            "full" also if ``inner`` has no betas and eps, or if it has weight decay.

    Example:
        >>> from rasa_research.optim import LoraPro
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> optimizer = LoraPro(model, torch.optim.AdamW, lr=1e-3)
        >>> ids = torch.randint(0, 32, (2, 9))
        >>> model(input_ids=ids, labels=ids).loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        inner: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        *,
        params: Iterable[Any] | None = None,
        ridge: float = 1e-6,
        iterations: int = 16,
        tolerance: float = 1e-3,
        moments: Literal["factors", "full"] = "factors",
        **inner_options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
        if not (isinstance(inner, type) and issubclass(inner, torch.optim.Optimizer)):
            raise TypeError(f"inner: expected a class of torch.optim, got {inner!r}.")
        closure = inspect.signature(inner.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ValueError(
                f"inner: expected an optimizer that steps without a closure, got {inner.__name__}."
            )
        for name, number in (("ridge", ridge), ("tolerance", tolerance)):
            if not checked_number(name, number) >= 0:
                raise ValueError(f"{name}: expected a number >= 0, got {number}.")
        if checked_integer("iterations", iterations) < 1:
            raise ValueError(f"iterations: expected an integer >= 1, got {iterations}.")
        if moments not in ("factors", "full"):
            raise ValueError(f"moments: expected 'factors' or 'full', got {moments!r}.")
        self.ridge, self.iterations, self.tolerance = float(ridge), iterations, float(tolerance)
        self.moments = moments
        self._groups = find_groups(model)
        if params is None:
            params = [each for each in unwrap(model).parameters() if each.requires_grad]
        self.inner: torch.optim.Optimizer = inner(params, **inner_options)
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self._share()
        self._full: dict[str, dict[str, Any]] = {}
        if moments == "full":
            self._check_full()

    def _share(self) -> None:
        """Share the inner optimizer's groups and state, which schedulers and scalers change."""
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no closure, no loss
        """Replace the adapter's gradients, and step.

        Raises:
            ValueError: there is a closure, or weight decay with moments="full".
        """
        if closure is not None:
            raise ValueError(
                "closure: expected None, got one, which would compute the gradients again after "
                "they were adjusted."
            )
        options = {id(each): group for group in self.param_groups for each in group["params"]}
        full = self.moments == "full"
        if full:
            self._check_full()
        stepped: list[tuple[Tensor, Tensor]] = []
        for group in self._groups:
            problem = group.problem(options)
            if problem is None:
                continue
            if not full:
                problem.write(self._solve(problem, problem.gradient))
                continue
            problem.write(self._full_step(problem, options))
            for parameter in problem.parameters():
                grad = cast(Tensor, parameter.grad)
                parameter.sub_(grad * options[id(parameter)]["lr"])
                parameter.grad = None  # so that the inner optimizer skips this parameter
                stepped.append((parameter, grad))
        self.inner.step()
        for parameter, grad in stepped:
            parameter.grad = grad

    def _solve(self, problem: Problem, gradient: Tensor) -> Tensor:
        """Return the least-norm z with J^T J z = G, both flat."""
        ranks, trained = problem.ranks, problem.trained
        if ranks.pool.shape[1]:
            return pool_steps(ranks, gradient, trained, self.ridge, self.iterations, self.tolerance)
        return pair_steps(ranks, gradient, trained, self.ridge)

    def _full_step(self, problem: Problem, options: dict[int, dict[str, Any]]) -> Tensor:
        """Solve for the direction that Adam takes on the full gradients J z.

        Besides the moments, only one full matrix is in memory at a time.
        """
        ranks, total = problem.ranks, torch.zeros_like(problem.gradient)
        step = self._solve(problem, problem.gradient)
        first = options[id(problem.parameters()[0])]
        for number, (layer, parts) in enumerate(zip(problem.layers, problem.parts, strict=True)):
            its = options[id(parts[0].tensor)] if parts else first
            direction = self._adam(layer.name, ranks.change(number, step), its)
            ranks.add_gradient(number, direction, total)
        for part, trained in zip(ranks.split(total), problem.trained, strict=True):
            part.mul_(trained.unsqueeze(1))
        return self._solve(problem, total)

    def _adam(self, name: str, gradient: Tensor, options: dict[str, Any]) -> Tensor:
        """Update a layer's moments with a full gradient (out, in); return Adam's direction."""
        state = self._full.get(name)
        if state is None:
            state = {"step": 0, "exp_avg": torch.zeros_like(gradient)}
            state["exp_avg_sq"] = torch.zeros_like(gradient)
            self._full[name] = state
        state["step"] += 1
        beta1, beta2 = options["betas"]
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (square / (1 - beta2 ** state["step"])).sqrt_().add_(options["eps"])
        direction: Tensor = (mean / (1 - beta1 ** state["step"])).div_(scale)
        return direction

    def forget(self, parameters: Iterable[Tensor]) -> None:
        """Drop the full gradients' moments of layers that have one of ``parameters`` as a factor.

        Call it after resetting factors, as ``training.Boosting`` does. It does not change
        ``state``, which has the state of ``inner``.
        """
        anew = set(map(id, parameters))
        for layer in (layer for group in self._groups for layer in group.layers):
            if any(id(factor) in anew for factor in layer.factors()[:4]):
                self._full.pop(layer.name, None)

    def _check_full(self) -> None:
        """Raise ValueError if the inner optimizer is not Adam, or does more than plain Adam."""
        for group in self.param_groups:
            if not {"betas", "eps", "lr"} <= group.keys():
                raise ValueError(
                    "inner: expected Adam or AdamW, because moments='full' uses their betas and "
                    f"eps, got {type(self.inner).__name__}."
                )
            for name in ("weight_decay", "amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(
                        f"{name}: expected 0 or False with moments='full', got {group[name]}; the "
                        "step changes the full weights, and A and B cannot represent their decay."
                    )

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state and, for "full", the moments by layer name."""
        state = super().state_dict()
        if self.moments == "full":
            state[_KEY] = {name: dict(layer) for name, layer in self._full.items()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state from ``state_dict``.

        Raises:
            ValueError: the state is for other parameter groups, or the other kind of moments.
        """
        if (_KEY in state_dict) != (self.moments == "full"):
            other = "full" if _KEY in state_dict else "factors"
            raise ValueError(
                f"state_dict: expected one with moments={self.moments!r}, got one with {other!r}."
            )
        self.inner.load_state_dict({k: v for k, v in state_dict.items() if k != _KEY})
        self._share()
        devices = {
            layer.name: layer.factors().A.device for group in self._groups for layer in group.layers
        }
        self._full = {
            name: {
                key: value.to(devices[name], copy=True) if isinstance(value, Tensor) else value
                for key, value in layer.items()
            }
            for name, layer in state_dict.get(_KEY, {}).items()
        }
