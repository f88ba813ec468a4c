"""A whole training step as a CUDA graph; on a CPU, its operations noted and run again.

Forwards, operators and cached packs under capture: tests/nn/test_graphs.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import rasa_ext
from tests.helpers.adapters import patched
from tests.helpers.cuda import Captured, assert_close
from tests.helpers.models import LLAMA
from tests.helpers.operators import P


class Training:
    """A patched Llama, its optimizer, and the memory from which a step takes its tokens."""

    def __init__(self, dtype: torch.dtype, device: str, dropout: float) -> None:
        self.model = patched(LLAMA.build().to(device, dtype), dropout=dropout).train()
        self.tokens = LLAMA.inputs(0, device=device)["input_ids"]
        self.parameters = rasa_ext.adapter_parameters(self.model)
        self.optimizer = torch.optim.SGD(self.parameters, 0.05, momentum=0.9)

    def step(self) -> list[Tensor]:
        """Logits and gradients, which show what earlier steps have done to the parameters."""
        logits = LLAMA.call(self.model, input_ids=self.tokens)
        self.optimizer.zero_grad()
        logits.float().square().mean().backward()
        self.optimizer.step()
        return [logits, *(parameter.grad for parameter in self.parameters)]

    def become(self, other: Training) -> None:
        self.model.load_state_dict(other.model.state_dict())
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))


@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replays_train_as_steps_do(dtype, dropout, device, fused, streams):
    """Each on tokens and under masks of its own."""
    captured, eager = (Training(dtype, device, dropout) for _ in range(2))
    graph = Captured(captured.step)
    eager.become(captured)
    for seed in range(1, 4):
        tokens = LLAMA.inputs(seed, device=device)["input_ids"]
        found = []
        for training, run in ((captured, graph.replay), (eager, eager.step)):
            training.tokens.copy_(tokens)
            torch.manual_seed(seed)
            found.append(run())
        # While it is captured, transformers' attention takes a mask, and thus other kernels.
        assert_close(*found, dtype)
