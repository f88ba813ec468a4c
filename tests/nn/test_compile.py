"""torch.compile of patched models as one graph, with gradients compared with the oracle."""

import pytest
import torch

from tests.helpers.adapters import check_step, patched, randomize
from tests.helpers.models import CHECKPOINTED, SEQUENTIAL, SHALLOW, VIT, ids


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
    randomize(model, 5)  # the compiled graph must read the new values
    check_step(entry, base, model, compiled, seed=1)
    with torch.no_grad():
        inputs = entry.inputs(2)
        quiet = entry.loss(compiled, inputs)[0]
        torch.testing.assert_close(quiet, entry.loss(model, inputs)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entry", [VIT, CHECKPOINTED], ids=ids)
def test_compile_with_checkpointing(entry):
    """Models with checkpointing compile as one graph: a transformers model and a user-defined one.

    The code that passes gradients into re-entrant checkpoints must not break the graph.
    """
    torch._dynamo.reset()
    base = entry.build()
    model = patched(base).train()
    if entry is VIT:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    check_step(entry, base, model, torch.compile(model, fullgraph=True, backend="aot_eager"))
