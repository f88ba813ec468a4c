"""save_pretrained and Trainer checkpoints of patched models: no weight is lost on loading."""

import copy
import errno
import functools
import gc
import os
import weakref

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import rasa_ext
from rasa_ext.checkpoint import pretrained
from rasa_ext.patching.state import patch_state
from rasa_ext.peft import RasaConfig
from rasa_ext.writing import WriteError
from tests.helpers import experts
from tests.helpers.adapters import patched, randomize, same_adapters, through_file
from tests.helpers.models import BERT, FAMILIES, GPT2, LLAMA, SEQUENTIAL, logits
from tests.helpers.refusals import refused
from tests.helpers.trained_tokens import with_moved_rows
from tests.helpers.trainers import QUIET


def with_experts(entry):
    config = rasa_ext.RasaConfig(rank=4, k=1, experts="shared")
    return patched(entry.build(), config=config)


MERGED = [(entry, lambda entry: patched(entry.build())) for entry in FAMILIES]
MERGED += [(experts.entry(family), with_experts) for family in experts.UNLIKE]
MERGED += [(entry, with_moved_rows) for entry in (LLAMA, GPT2)]  # GPT2's head is tied


@pytest.mark.parametrize(("entry", "adapt"), MERGED)
def test_merged_it_writes_the_merged_model(entry, adapt, tmp_path):
    model = adapt(entry)
    rasa_ext.merge(model)
    expected = logits(entry, model)
    model.save_pretrained(tmp_path)
    again, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    assert torch.equal(logits(entry, again), expected)


def test_what_cannot_be_written_is_refused_with_the_call_to_use(tmp_path):
    model = patched(LLAMA.build())
    with pytest.raises(ValueError, match=r"push_to_hub: .* call rasa_ext\.save_adapter"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    model.save_pretrained(tmp_path, is_main_process=False)
    rasa_ext.merge(model)
    quantized = model.model.layers[0].self_attn.q_proj
    quantized.merged_base = nn.Linear(2, 2)  # like a merge into a quantized layer
    with pytest.raises(ValueError, match=r"model: .*\n?.* rasa_ext\.merge_and_unload\(model\)"):
        model.save_pretrained(tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("off", [rasa_ext.unpatch, rasa_ext.merge_and_unload])
def test_without_a_patch_it_is_the_models_own(off, tmp_path):
    model = off(patched(GPT2.build()))
    expected = logits(GPT2, model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(GPT2, type(model).from_pretrained(tmp_path)), expected)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})


def test_a_copy_writes_its_own_adapter_and_a_model_is_freed(tmp_path):
    base = BERT.build()
    model = patched(base)
    for name, other in (("copied", copy.deepcopy(model)), ("loaded", through_file(model))):
        randomize(other, 11)
        other.save_pretrained(tmp_path / name)
        again = rasa_ext.load_adapter(copy.deepcopy(base), tmp_path / name)
        assert torch.equal(logits(BERT, again), logits(BERT, other))
    gc.collect()
    gc.disable()
    try:
        dead = weakref.ref(model)
        del model
        assert dead() is None
    finally:
        gc.enable()


def test_a_state_of_all_that_is_trained_is_whole():
    """Trainer may load a state of only the trained tensors; any other partial state is refused."""
    base = LLAMA.build()
    model = patched(base, modules_to_save=["norm"])
    trained = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
    other = rasa_ext.patch_model(copy.deepcopy(base), modules_to_save=["norm"], rank=4)
    assert not any(other.load_state_dict(trained))
    assert torch.equal(logits(LLAMA, other), logits(LLAMA, model))
    more = {**trained, "lm_head.weight": base.lm_head.weight}
    for state in (dict(list(trained.items())[1:]), more):
        with pytest.raises(RuntimeError, match="Missing key"):
            other.load_state_dict(state)


def trained(entry, folder, resume=None, saved=(), by_hand="nothing", part="", **options):
    """Train a patched model for six steps, maybe resumed; return the trainer and all losses."""
    model = entry.build()
    rasa_ext.patch_model(model.get_submodule(part), 4, 1, modules_to_save=saved)
    for name, parameter in model.named_parameters():
        if by_hand in name:
            parameter.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 24, (8,), generator=generator) for _ in range(16)]
    settings = {**QUIET, "max_steps": 6, "seed": 1, "save_strategy": "steps", "save_steps": 2}
    arguments = TrainingArguments(str(folder), **{**settings, "learning_rate": 1e-2, **options})
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4])
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer, [each["loss"] for each in trainer.state.log_history if "loss" in each]


@pytest.mark.parametrize(
    ("entry", "by_hand"),
    [(LLAMA, "nothing"), (LLAMA, "weight"), (GPT2, "weight"), (GPT2, "bias"), (GPT2, "ln_")],
    ids=lambda each: getattr(each, "name", each),
)
def test_trainer_saves_and_resumes(entry, by_hand, tmp_path, caplog):
    options = {"saved": ["lm_head"], "by_hand": by_hand}
    whole, losses = trained(entry, tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    size = sum(tensor.nbytes for tensor in whole.model.state_dict().values())
    if by_hand != "weight":
        assert (checkpoint / "model.safetensors").stat().st_size < size
    caplog.clear()
    resumed, again = trained(entry, tmp_path / "again", checkpoint, **options)
    assert again == losses
    assert "missing keys" not in caplog.text
    assert same_adapters(resumed.model, whole.model)
    whole.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    for folder in (tmp_path / "saved", tmp_path / "whole" / "checkpoint-6"):
        read = rasa_ext.load_adapter(entry.build(), folder)
        assert torch.equal(logits(entry, read), logits(entry, whole.model))


def test_the_files_of_a_checkpoint_come_together(tmp_path, monkeypatch):
    """If the disk is full after the adapter, no new file remains; other files stay."""
    model, folder = patched(LLAMA.build()), tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "optimizer.pt").write_text("Trainer's")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pretrained, "save_file", full)
    with pytest.raises(WriteError, match="no space left"):
        model.save_pretrained(folder)
    monkeypatch.undo()
    assert os.listdir(folder) == ["optimizer.pt"]
    model.save_pretrained(folder)
    names = {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"}
    assert set(os.listdir(folder)) == {"optimizer.pt", *names}


@pytest.mark.parametrize("by_hand", ["nothing", "norm"])
def test_trainer_goes_back_to_the_best_checkpoint(by_hand, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    # The loss falls, so the last checkpoint counts as the worst.
    options |= {"metric_for_best_model": "loss", "greater_is_better": True}
    trainer, _ = trained(LLAMA, tmp_path, by_hand=by_hand, **options)
    best = trainer.state.best_model_checkpoint
    assert best != str(tmp_path / "checkpoint-6")
    read = rasa_ext.load_adapter(LLAMA.build(), best)
    assert torch.equal(logits(LLAMA, read), logits(LLAMA, trainer.model))


def test_models_without_save_pretrained_get_none():
    assert not hasattr(patched(SEQUENTIAL.build()), "save_pretrained")


@pytest.mark.parametrize("merged", [False, True])
def test_a_part_that_is_patched(merged, tmp_path):
    """The whole model's save_pretrained is refused until the part is plain again."""
    model = LLAMA.build()
    randomize(rasa_ext.patch_model(model.model, 4, 1), 3)
    expected = logits(LLAMA, model)
    if merged:
        rasa_ext.merge(model.model)
    said = r"model: .*'model' .* rasa_ext\.save_adapter\(model\.model, .*merge_and_unload\(model\."
    refused(lambda: model.save_pretrained(tmp_path / "no"), model, said)
    copied = copy.deepcopy(model)
    refused(lambda: copied.save_pretrained(tmp_path / "no"), copied, said)
    assert not list((tmp_path / "no").glob("*.safetensors"))
    rasa_ext.save_adapter(model.model, tmp_path / "adapter")
    again = LLAMA.build()
    rasa_ext.load_adapter(again.model, tmp_path / "adapter")
    torch.testing.assert_close(logits(LLAMA, again), expected)
    model.load_state_dict(model.state_dict())
    rasa_ext.merge_and_unload(model.model)
    model.save_pretrained(tmp_path / "whole")
    whole = type(model).from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(LLAMA, whole), expected)


def test_trainer_resumes_with_a_part_that_is_patched(tmp_path):
    options = {"part": "model"}
    with pytest.warns(UserWarning, match=r"model: .*rasa_ext\.save_adapter\(model\.model"):
        whole, losses = trained(LLAMA, tmp_path / "whole", **options)
    again, others = trained(LLAMA, tmp_path / "a", tmp_path / "whole/checkpoint-2", **options)
    assert others == losses
    assert same_adapters(again.model, whole.model)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
@pytest.mark.parametrize("name", ["adapter", "checkpoint-7"])
def test_a_given_state_is_written(merged, prefix, name, tmp_path):
    """Such as averages, or what Trainer reads from a compiled model."""
    base = LLAMA.build()
    options = {"modules_to_save": ["norm"]}
    model, other = patched(base, seed=1, **options), patched(base, seed=2, **options)
    if merged:
        rasa_ext.merge(model)
        rasa_ext.merge(other)
    state = {prefix + key: tensor for key, tensor in other.state_dict().items()}
    model.save_pretrained(tmp_path / name, state_dict=state)
    read = type(base).from_pretrained if merged else functools.partial(rasa_ext.load_adapter, base)
    expected = logits(LLAMA, other)
    assert torch.equal(logits(LLAMA, read(tmp_path / name)), expected)
    if name != "adapter" and not merged:
        resumed = patched(LLAMA.build(), seed=3, **options)
        resumed.load_state_dict(load_file(tmp_path / name / "model.safetensors"))
        assert torch.equal(logits(LLAMA, resumed), expected)


def test_a_given_state_without_a_trained_tensor_is_refused(tmp_path):
    model = patched(LLAMA.build())
    state = dict(model.state_dict())
    del state["model.layers.0.mlp.up_proj.d"]
    said = r"state_dict: .*1 missing: .*up_proj\.rasa_d"
    refused(lambda: model.save_pretrained(tmp_path, state_dict=state), model, said)
    assert not os.listdir(tmp_path)


def names_before(version: str, model: nn.Module) -> dict[str, str]:
    """Return pools' names of an older version by name: the root's, or the first layer's."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = patch_state(model).plan.groups
    return {
        names[id(tensor)]: (
            f"rasa_pools.{index}.{field}" if version == "root" else f"{group.names[0]}.pool.{field}"
        )
        for index, group in enumerate(groups)
        for field, tensor in model.get_submodule(group.names[0]).pool_tensors().items()
    }


@pytest.mark.parametrize("version", ["root", "layer"])
def test_states_of_older_versions_are_refused(version, tmp_path):
    """Their parameters had another order, by which an optimizer's state finds its parameters."""
    whole, _ = trained(LLAMA, tmp_path / "whole", max_steps=2)
    before = names_before(version, whole.model)
    assert before
    file = tmp_path / "whole" / "checkpoint-2" / "model.safetensors"
    state = {before.get(name, name): tensor for name, tensor in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^state_dict: .*older rasa_ext"):
        trained(LLAMA, tmp_path / "again", file.parent)
    model = patched(LLAMA.build())
    refused(lambda: model.load_state_dict(state, strict=False), model, "state_dict")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("front", ["patch", "peft"])
def test_moments_of_another_order_are_refused(front, fused):
    """Fused kernels would write outside of the moments' memory."""
    if front == "patch":
        model = patched(LLAMA.build())
    else:
        model = get_peft_model(LLAMA.build(), RasaConfig(r=4))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def optimizer(names):
        return torch.optim.AdamW([parameters[name] for name in names], 0.1, fused=fused)

    def loss() -> Tensor:
        return LLAMA.call(model, **LLAMA.inputs(0)).square().mean()

    older = sorted(parameters, key=lambda name: "rasa_pool" not in name)
    assert older != list(parameters)
    states = []
    for names in (parameters, older):
        trained = optimizer(names)
        loss().backward()
        trained.step()
        states.append(trained.state_dict())
    now = {name: p.detach().clone() for name, p in parameters.items()}
    resumed = optimizer(parameters)
    resumed.load_state_dict(states[1])
    with pytest.raises(ValueError, match=r"^optimizer: expected exp_avg of shape"):
        resumed.step()
    assert all(torch.equal(p, now[name]) for name, p in parameters.items())
    resumed.load_state_dict(states[0])
    resumed.step()
