"""compress_lora makes a smaller RaSA adapter from a LoRA that PEFT saved."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from rasa_ext.checkpoint import read_lora
from rasa_research import solver
from rasa_research.solver.compress import nearest_to
from rasa_research.solver.fit import Solver
from tests.helpers import oracle
from tests.helpers.adapters import LargestTensor, adapters
from tests.helpers.models import LLAMA
from tests.helpers.peft import WEIGHTS, lora_changes, save_entry_lora
from tests.helpers.refusals import Snapshot


@pytest.mark.parametrize(("rank", "k"), [(3, 1), (3, 0), (5, 2), (9, 1), (7, 0)])
def test_fewer_numbers_by_the_solver(rank, k, tmp_path):
    base, theirs = save_entry_lora(
        LLAMA, tmp_path, rank_pattern={"o_proj": 9}, modules_to_save=["norm"]
    )
    deltas = lora_changes(theirs)
    found = solver.compress_lora(base, tmp_path, rank, k, iterations=8)
    found.install(base)
    assert (found.config.rank, found.config.k) == (rank, k)
    for group, result in found.groups.items():
        targets = [deltas[name] for name in group.names]
        total = sum(d.square().sum() for d in targets)
        tail = sum(torch.linalg.svdvals(d)[rank:].square().sum() for d in targets)
        assert result.lora_error == pytest.approx((tail / total).item(), abs=1e-6)
        assert result.errors[-1] <= result.lora_error + 1e-12
        made = [oracle.delta(adapters(base)[name]) for name in group.names]
        rest = sum((m - d).square().sum() for m, d in zip(made, targets, strict=True))
        assert result.errors[-1] == pytest.approx((rest / total).item(), abs=1e-6)
    norm = base.get_submodule("model.norm").weight
    saved = load_file(tmp_path / WEIGHTS)["base_model.model.model.norm.weight"]
    assert torch.equal(norm, saved)


def test_no_out_x_in_matrix_is_formed(tmp_path):
    """The largest tensor stays far below 300 x 400; the model is on the meta device."""
    with torch.device("meta"):
        model = torch.nn.Sequential(*[torch.nn.Linear(400, 300) for _ in range(3)])
    tensors = {}
    for i in range(3):
        tensors[f"base_model.model.{i}.lora_A.weight"] = torch.randn(5, 400)
        tensors[f"base_model.model.{i}.lora_B.weight"] = torch.randn(300, 5)
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 5}')
    with LargestTensor() as seen:
        found = nearest_to(model, read_lora(tmp_path), "x", 3, 1, Solver(iterations=2))
        found.save(model, tmp_path / "out")
    assert 0 < seen.numel <= 400 * 2 * (3 + 8)


def test_bad_ranks(tmp_path):
    base, _ = save_entry_lora(LLAMA, tmp_path)
    before = Snapshot(base)
    for rank, k, message in (
        (0, 0, "rank: expected an integer >= 1"),
        (8, 9, "k: expected 0"),
    ):
        with pytest.raises(ValueError, match=message):
            solver.compress_lora(base, tmp_path, rank, k)
    before.assert_unchanged()
