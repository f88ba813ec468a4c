"""Check that a call raises an error and leaves the model unchanged."""

import re
from collections.abc import Callable, Iterable

import pytest
from torch import nn

from tests.helpers.adapters import same_bits


def refused(call: Callable, model: nn.Module, *said: str, kind=(ValueError, TypeError)) -> None:
    """Assert that the call raises, the message matches every part, and the model is unchanged.

    ``said`` are regular expressions.
    """
    before = Snapshot(model)
    with pytest.raises(kind) as caught:
        call()
    for part in said:
        assert re.search(part, str(caught.value)), (part, str(caught.value))
    before.assert_unchanged()


class Snapshot:
    """Everything about a model that a refused call must not change."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules = {name: id(module) for name, module in named_modules(model)}
        self.parameters = named_flags(model)
        self.values = {key: value.clone() for key, value in model.state_dict().items()}
        self.training = model.training
        self.hooks = hook_counts(model)

    def assert_unchanged(self) -> None:
        assert {name: id(module) for name, module in named_modules(self.model)} == self.modules
        assert named_flags(self.model) == self.parameters
        state = self.model.state_dict()
        assert state.keys() == self.values.keys()
        for key, value in state.items():
            assert same_bits(value, self.values[key]), key
        assert self.model.training == self.training
        assert hook_counts(self.model) == self.hooks


def named_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    return model.named_modules(remove_duplicate=False)


def named_flags(model: nn.Module) -> dict[str, tuple[int, bool]]:
    named = model.named_parameters(remove_duplicate=False)
    return {name: (id(parameter), parameter.requires_grad) for name, parameter in named}


def hook_counts(model: nn.Module) -> dict[str, int]:
    return {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks)
        for name, module in named_modules(model)
    }
