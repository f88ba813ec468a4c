"""SFTTrainer over quantized bases: TRL casts all trainable parameters to bfloat16."""

import pytest
import torch
from peft import get_peft_model

import rasa_ext
from rasa_ext.peft import RasaConfig
from tests.helpers.adapters import same_tensors
from tests.helpers.peft import trained
from tests.helpers.quantized import make_model as quantizable
from tests.helpers.quantized import quantized
from tests.helpers.trainers import sft_trainer


def base(form: str) -> torch.nn.Module:
    """Return a quantized model with the flags that transformers sets when loading one."""
    model = quantized(quantizable(), form)
    model.is_loaded_in_8bit = form == "int8"
    model.is_loaded_in_4bit = not model.is_loaded_in_8bit
    return model


def diagonals(model) -> dict[str, torch.Tensor]:
    """Return a copy of each layer's d, with or without PEFT."""
    last = (".rasa_d.default", ".d")
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(last)}


def tuned(base):
    return get_peft_model(base, RasaConfig(r=8, rasa_k=1, task_type="CAUSAL_LM"))


def patched(base):
    return rasa_ext.patch_model(base, rank=8, k=1)


CASES = [(adapt, form, None) for adapt in (tuned, patched) for form in ("nf4", "int8")]
CASES += [(tuned, "nf4", reentrant) for reentrant in (True, False)]  # kinds of checkpointing


@pytest.mark.parametrize(("adapt", "form", "reentrant"), CASES)
def test_every_entry_of_the_diagonal_moves(adapt, form, reentrant, tmp_path):
    options = {
        "max_steps": 10,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": reentrant is not None,
        "gradient_checkpointing_kwargs": {"use_reentrant": bool(reentrant)},
    }
    training = sft_trainer(adapt(base(form)), tmp_path, **options)
    before = diagonals(training.model)
    assert {d.dtype for d in before.values()} == {torch.bfloat16}  # TRL's cast
    with pytest.warns(UserWarning, match="cast to torch.bfloat16.* is torch.float32 again"):
        training.train()
    after = diagonals(training.model)
    moved = torch.cat([before[name].float() != after[name].float() for name in before])
    assert moved.shape == (14 * 9,)
    assert moved.all()
    assert {p.dtype for p in trained(training.model).values()} == {torch.float32}
    state = training.optimizer.state.values()
    assert {each["exp_avg"].dtype for each in state} == {torch.float32}


def test_a_config_that_says_bfloat16_is_kept_to(tmp_path, recwarn):
    config = RasaConfig(r=8, adapter_dtype="bfloat16", task_type="CAUSAL_LM")
    training = sft_trainer(base("nf4"), tmp_path, config, max_steps=1)
    training.train()
    assert {p.dtype for p in trained(training.model).values()} == {torch.bfloat16}
    assert not [w for w in recwarn if "adapter_dtype" in str(w.message)]


def test_a_resumed_run_goes_on_with_unrounded_numbers(tmp_path):
    """Float32 values of the file reach the parameters that TRL cast, before the first step."""
    saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = sft_trainer(tuned(base("nf4")), tmp_path, **saving)
    whole.train()
    again = sft_trainer(tuned(base("nf4")), tmp_path / "resumed", **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_tensors(trained(again.model), trained(whole.model))
