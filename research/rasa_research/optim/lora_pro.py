"""LoraPro: LoRA-Pro over any optimizer, for adapters with and without a pool."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from rasa_ext.distributed import unwrap
from rasa_ext.methods import checked_integer, checked_number
from rasa_research.optim.groups import Problem, find_groups
from rasa_research.optim.least_norm import pair_steps, pool_steps

_KEY = "lora_pro"
"""Where the moments of full gradients stand in a state dict."""


class LoraPro(torch.optim.Optimizer):
    """An optimizer that first makes an adapter's gradients those of LoRA-Pro (arXiv 2407.18242).

    Autograd's gradients of A and B say how each of them lowers the loss alone. LoRA-Pro asks for
    the step of both, and here of the pool as well, that changes the weights most nearly as a step
    of full fine-tuning would: the least-squares solution of least norm, J^+ g. It is found from
    autograd's gradients, written over them in ``.grad``, and ``inner`` does the rest. The diagonal
    d, and whatever else is trained, keeps its gradient.

    For LoRA, and wherever a layer trains a pair alone, the solution is exact, as published. For
    layers that share a pool it is found by conjugate gradients, which ``iterations`` cut off; what
    they have then is a descent direction, too.

    With ``moments="full"`` the moments of Adam are of the full gradients, as in the paper's
    results. It costs two float32 matrices of each adapted weight's shape (out, in), which is what
    full fine-tuning keeps for them: 56 GB for the linear layers of Llama-3.1-8B. A and B are
    stepped by the solution for Adam's direction, the rest by ``inner``. ``"factors"`` keeps nothing
    beside the moments of ``inner``, whose division by each number's own size undoes a part of the
    adjustment.

    Clip gradients before the step, as ever: what is clipped is autograd's gradient. Works with
    GradScaler, learning-rate schedulers, DistributedDataParallel, and transformers' Trainer
    (``optimizers=(optimizer, None)``). Make it after ``patch_model``.

    Args:
        model: a model with adapters of this package: patched, loaded, or of ``rasa_ext.peft``.
        inner: a class of ``torch.optim``.
        params: what to optimize, in any form that ``inner`` takes, say groups with rates of their
            own; by default every parameter of the model that requires a gradient.
        ridge: what is added to J^T J, over the mean of its diagonal. It leaves out directions that
            the factors hardly reach, where rounding errors of the gradients would be enlarged: take
            1e-4 where those are computed in bfloat16.
        iterations: of conjugate gradients, at most, for layers that share a pool.
        tolerance: they end where the equation's residual, over the gradient, is below this.
        moments: "factors" or "full".
        inner_options: those of ``inner``: lr, betas, ...

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; with "full"
            also where ``inner`` has no betas and eps or asks for weight decay.

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
        """Let what schedulers and scalers see be the inner optimizer's own."""
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no closure, no loss
        """Rewrite the gradients of the adapter, and step.

        Raises:
            ValueError: a closure was given, or weight decay with moments="full".
        """
        if closure is not None:
            raise ValueError(
                "closure: expected None, got one; it would compute the gradients anew, after they "
                "were adjusted."
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
                parameter.grad = None  # so that the inner optimizer leaves it alone
                stepped.append((parameter, grad))
        self.inner.step()
        for parameter, grad in stepped:
            parameter.grad = grad

    def _solve(self, problem: Problem, gradient: Tensor) -> Tensor:
        """Find z of the least norm with J^T J z = G, both flat."""
        ranks, trained = problem.ranks, problem.trained
        if ranks.pool.shape[1]:
            return pool_steps(ranks, gradient, trained, self.ridge, self.iterations, self.tolerance)
        return pair_steps(ranks, gradient, trained, self.ridge)

    def _full_step(self, problem: Problem, options: dict[int, dict[str, Any]]) -> Tensor:
        """Solve for the direction that Adam takes on the full gradients, J z of the raw ones.

        Of the full matrices but the moments, one at a time is in memory.
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
        """Take a layer's full gradient (out, in) into its moments, and give Adam's direction."""
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
        """Drop the moments of full gradients of the layers whose factors these are.

        For those who let factors begin anew, as ``training.Boosting`` does; what ``inner``
        knows of a parameter is in ``state``.
        """
        anew = set(map(id, parameters))
        for layer in (layer for group in self._groups for layer in group.layers):
            if any(id(factor) in anew for factor in layer.factors()[:4]):
                self._full.pop(layer.name, None)

    def _check_full(self) -> None:
        """Raise ValueError where the inner optimizer is not Adam, or does more than Adam."""
        for group in self.param_groups:
            if not {"betas", "eps", "lr"} <= group.keys():
                raise ValueError(
                    "inner: expected Adam or AdamW, whose betas and eps moments='full' uses, got "
                    f"{type(self.inner).__name__}."
                )
            for name in ("weight_decay", "amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(
                        f"{name}: expected 0 or False with moments='full', got {group[name]}; the "
                        "step is a change of the full weights, of which A and B cannot decay."
                    )

    def state_dict(self) -> dict[str, Any]:
        """Give the inner optimizer's state, with the full moments by the layers' names, if any."""
        state = super().state_dict()
        if self.moments == "full":
            state[_KEY] = {name: dict(layer) for name, layer in self._full.items()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave.

        Raises:
            ValueError: it is of other groups of parameters, or of the other kind of moments.
        """
        if (_KEY in state_dict) != (self.moments == "full"):
            other = "full" if _KEY in state_dict else "factors"
            raise ValueError(
                f"state_dict: expected one of moments={self.moments!r}, got one of {other!r}."
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
