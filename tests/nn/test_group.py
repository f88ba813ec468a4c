"""adapted_group: all layers of a group in one call."""

import pytest
import torch
from torch import Tensor, nn

from rasa_ext.nn import functional
from tests.helpers.adapters import adapters, gradients, patched, plain_model, trainable_copies
from tests.helpers.operators import lists


class Case:
    """Three layers of a group, with an input each, and the official formula over copies."""

    def __init__(self, k: int = 1, bias: bool = True, tokens: int = 5, device: str = "cpu"):
        base = nn.Sequential(*(nn.Linear(9, 7, bias) for _ in range(3))).double().to(device)
        self.model = patched(base, 4, k, adapter_dtype=torch.float64)
        self.copies = trainable_copies(adapters(self.model))
        self.simple = plain_model(base, self.copies)
        self.x = torch.randn(3, tokens, 9, dtype=torch.float64, device=device).requires_grad_()

    def args(self) -> list:
        weights, bias = ([getattr(each, n) for each in self.model] for n in ("weight", "bias"))
        bias = None if bias[0] is None else bias
        return [self.x, weights, bias, *lists(list(adapters(self.model).values()))]

    def observed(self, y: Tensor, found) -> dict[str, Tensor]:
        self.x.grad = None
        y.square().sum().backward()
        return {"y": y.detach(), "x": self.x.grad, **gradients(found)}

    def check(self, run=functional.adapted_group) -> None:
        expected = torch.stack([layer(x) for layer, x in zip(self.simple, self.x, strict=True)])
        expected = self.observed(expected, self.copies)
        found = self.observed(run(*self.args()), adapters(self.model))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [0, 1, 4])
def test_values_and_gradients_are_the_formulas(k, bias, tokens, device):
    Case(k, bias, tokens, device).check()


def test_compiles_as_one_graph(device):
    torch._dynamo.reset()
    run = torch.compile(functional.adapted_group, fullgraph=True, backend="aot_eager")
    Case(device=device).check(run)


def test_a_second_derivative_is_refused(device):
    case = Case(device=device)
    y = functional.adapted_group(*case.args())
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(y.square().sum(), case.x, create_graph=True)


LENGTHS = [
    (0, "x", lambda x: x[0]),
    (0, "x", lambda x: x[:0]),
    (1, "weights", lambda weights: weights[:2]),
    (2, "bias", lambda bias: bias[:1]),
    (3, "A", lambda A: [*A, A[0]]),
    (7, "d", lambda d: d[:2]),
]


@pytest.mark.parametrize(("place", "name", "change"), LENGTHS)
def test_lists_of_other_lengths_are_refused(place, name, change):
    args = Case().args()
    args[place] = change(args[place])
    with pytest.raises(ValueError, match=f"^{name}: "):
        functional.adapted_group(*args)
