"""The sweep over one base in memory: its losses are those of single runs, to the bit."""

import torch

from examples import sweep
from tests.helpers.tiny_lm import make_model, make_tokenizer, sums


def test_a_sweep_is_its_single_runs():
    tokenizer, rows = make_tokenizer(), sums(36)
    batches = [sweep.encode(rows[i * 4 : i * 4 + 4], tokenizer) for i in range(9)]
    data = batches[:8], batches[8]
    base = make_model()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    study = sweep.sweep(base, *data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    for trial in study.trials:
        single = dict(sweep.train(make_model(), *data, **trial.params))
        assert trial.intermediate_values.items() <= single.items()
    steps = {max(trial.intermediate_values) for trial in study.trials}
    assert len(study.trials) == sweep.TRIALS
    assert sweep.RUNGS[-1] in steps
    assert len(steps) > 1  # some were stopped early
    assert study.best_value < sweep.held_out(base, data[1])


def test_only_completions_carry_a_loss():
    tokenizer = make_tokenizer()
    rows = sums(3)
    batch = sweep.encode(rows, tokenizer)
    for labels, row in zip(batch["labels"], rows, strict=True):
        assert tokenizer.decode(labels[labels != -100]) == row["completion"]
