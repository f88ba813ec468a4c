"""torch.compile of patched models as one graph, gradients against the oracle."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.adapters import (
    adapters,
    assert_matches_oracle,
    check_step,
    observe,
    patched,
    randomize,
)
from tests.helpers.models import SEQUENTIAL, SHALLOW, VIT, Checkpointed


@pytest.mark.parametrize(
    ("entry", "backend"),
    [*((entry, "aot_eager") for entry in SHALLOW), (SEQUENTIAL, "inductor")],
    ids=lambda value: getattr(value, "name", value),
)
def test_compile(entry, backend):
    torch._dynamo.reset()
    base = entry.build()
    model = patched(base).train()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    check_step(entry, base, model, compiled)
    randomize(model, 5)  # the compiled graph must read the parameters anew
    check_step(entry, base, model, compiled, seed=1)
    with torch.no_grad():
        inputs = entry.inputs(2)
        quiet = entry.loss(compiled, inputs)[0]
        torch.testing.assert_close(quiet, entry.loss(model, inputs)[0], rtol=1e-5, atol=1e-5)


def test_compile_with_checkpointing():
    """Where transformers' own checkpointing compiles as one graph at all."""
    torch._dynamo.reset()
    base = VIT.build()
    model = patched(base).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    check_step(VIT, base, model, torch.compile(model, fullgraph=True, backend="aot_eager"))


def test_compile_with_checkpointing_of_ones_own():
    """What lets gradients into re-entrant checkpoints must not break the graph."""
    torch._dynamo.reset()
    base = Checkpointed(use_reentrant=False)
    model = patched(base)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = {"x": torch.randint(0, 32, (4, 5))}
    observed = observe(compiled, adapters(model), SEQUENTIAL, inputs)
    assert_matches_oracle(SEQUENTIAL, base, model, observed, inputs)
