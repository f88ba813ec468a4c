"""Folders of adapters as LoRAs, without vLLM; tests/methods has every method's formula."""

import functools

import pytest
import torch

import rasa_ext
from rasa_ext.serving.expansion import expand
from tests.helpers import experts, peft
from tests.helpers.adapters import adapters, patched
from tests.helpers.tiny_lm import make_model

EXACT = {"rtol": 1e-6, "atol": 1e-6}


def change(found, name):
    """Return dW (out, in) of a layer: of the LoRA, and of the pool that was kept apart."""
    A, B = (found.tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    pools = [pool for pool in found.pools if name in pool.d]
    assert len(pools) <= 1
    return B @ A + sum((pool.B * pool.d[name]) @ pool.A for pool in pools)


def check(found, model):
    for name, (A, A_pool, B, B_pool, d) in adapters(model).items():
        if A_pool is not None:
            A, B = torch.cat([A, A_pool]), torch.cat([B, B_pool], 1)
        torch.testing.assert_close(change(found, name), (B * d) @ A, **EXACT)


def saved(folder, *ranks, **options):
    model = patched(make_model(), *ranks, **options)
    rasa_ext.save_adapter(model, folder)
    return model


OPTIONS = {
    "k=0": {"config": rasa_ext.RasaConfig(4, 0)},
    "k=1": {"config": rasa_ext.RasaConfig(4, 1)},
    "k=rank": {"config": rasa_ext.RasaConfig(2, 2)},
    "ranks": {"config": rasa_ext.RasaConfig(4, 1, rank_pattern={r"layers\.1\..*": 6})},
    "a pool of two kinds": {"groups": {"up and gate": ["up_proj", "gate_proj"]}},
    "two pools of a kind": {"groups": {"first": ["layers.0.mlp.up_proj"]}},
    "a head": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_dW_is_the_models(name, tmp_path):
    model = saved(tmp_path, **OPTIONS[name])
    check(expand(tmp_path), model)
    check(expand(tmp_path, keeps=lambda name: True), model)
    check(expand(tmp_path, keeps=lambda name: ".mlp." in name), model)


def test_ranks_with_pools_apart(tmp_path):
    """A slot needs r - k ranks, and a pool L k, once for all layers of a kind."""
    saved(tmp_path, 4, 1)
    layers = make_model().config.num_hidden_layers
    whole, apart = expand(tmp_path), expand(tmp_path, keeps=lambda name: True)
    assert (whole.settings["r"], apart.settings["r"]) == (3 + layers, 3)
    assert not whole.pools
    assert {len(pool.A) for pool in apart.pools} == {layers} == {len(p.d) for p in apart.pools}


def test_a_pool_without_own_ranks_leaves_a_lora_of_zeros(tmp_path):
    """Because vLLM takes no LoRA of rank 0."""
    saved(tmp_path, 2, 2)
    found = expand(tmp_path, keeps=lambda name: True)
    assert found.settings["r"] == 1
    assert not any(tensor.any() for tensor in found.tensors.values())


def test_a_layer_that_shares_with_none_is_expanded(tmp_path):
    saved(tmp_path, target_modules=["lm_head"])
    found = expand(tmp_path, keeps=lambda name: True)
    assert (found.settings["r"], found.pools) == (4, [])


def test_what_peft_saves(tmp_path):
    model = peft.adapted(make_model(), adapter_name="mine", task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    check(expand(tmp_path / "mine"), model.get_base_model())


@pytest.mark.parametrize("head", ["score", "classifier"])
def test_heads_that_vllm_takes_are_given(head, tmp_path):
    base = make_model()
    base.add_module(head, torch.nn.Linear(8, 3))
    rasa_ext.save_adapter(patched(base, modules_to_save=[head]), tmp_path)
    found = expand(tmp_path)
    assert found.settings["modules_to_save"] == [head]
    given = found.tensors[f"base_model.model.{head}.weight"]
    torch.testing.assert_close(given, base.get_submodule(head).weight)


def with_biases(folder):
    base = make_model()
    layer = base.model.layers[0].mlp.up_proj
    layer.bias = torch.nn.Parameter(torch.zeros(layer.out_features))
    peft.adapted(base, bias="rasa_only").save_pretrained(folder)


def with_experts(folder):
    rasa_ext.save_adapter(experts.patched(experts.model(), "slot"), folder)


def cut(folder):
    saved(folder)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def diverged(folder):
    model = patched(make_model())
    next(iter(adapters(model).values())).d.data[0] = torch.nan
    rasa_ext.save_adapter(model, folder)


def parts(**options):
    return functools.partial(saved, **options)


REFUSED = [
    (parts(modules_to_save=["norm"]), "vLLM serves .*model.norm.weight.*merge"),
    (parts(modules_to_save=["lm_head"]), "vLLM serves .*lm_head.weight.*merge"),
    (parts(trainable_token_indices=[1, 2]), "vLLM serves .*embed_tokens.token_adapter.*merge"),
    (with_biases, "up_proj.*bias"),
    (with_experts, r"experts\.\w+ are experts.*--expert-layout per-expert"),
    (cut, "adapter_model.safetensors: damaged or cut"),
    (diverged, "finite.*rasa_d.*It was not loaded"),
]


@pytest.mark.parametrize(("write", "said"), REFUSED)
def test_what_is_refused_by_name(write, said, tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}.*{said}"):
        expand(tmp_path)
