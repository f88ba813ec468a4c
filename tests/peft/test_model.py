"""get_peft_model: adapted layers, shared pools, and numbers of the official formula."""

import copy

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)

import rasa_ext
from rasa_ext.peft import RasaConfig
from rasa_ext.peft.layer import pools_in_files
from tests.helpers import models, oracle
from tests.helpers.adapters import RANK, check_step, same_tensors, through_file
from tests.helpers.models import ATTENTION, BERT, EVERY, GPT2, LLAMA, SEQUENTIAL, TIED
from tests.helpers.peft import TOKENS, adapted, layers, plain, tiny, trained
from tests.helpers.peft_sides import sides
from tests.helpers.refusals import refused
from tests.helpers.tiny_lm import make_model


@pytest.mark.parametrize("k", [0, 1, RANK])
@pytest.mark.parametrize("entry", EVERY, ids=models.ids)
def test_a_step_is_the_published_formulas(entry, k):
    base = entry.build()
    model = adapted(base, rasa_k=k)
    check_step(entry, base, plain(model), model)


@sides("mixtral")
def test_what_is_trained_is_the_adapter_and_each_number_counts_once(side, capsys):
    base, model = side.base(), side.one()
    expected = sum(tensor.numel() for tensor in get_peft_model_state_dict(model).values())
    every = expected + sum(p.numel() for p in base.parameters())
    assert model.get_nb_trainable_parameters() == (expected, every)
    model.print_trainable_parameters()
    assert f"trainable params: {expected:,} || all params: {every:,}" in capsys.readouterr().out
    assert all(".rasa_" in name for name in trained(model))
    status = model.get_model_status()
    found = status.enabled, status.active_adapters, status.merged_adapters
    assert found == (True, ["default"], [])
    assert (status.trainable_params, status.total_params) == (expected, every)
    assert status.num_adapter_layers == len(model.base_model.owners())
    rank = model.base_model.owners()[-1].named("default").factors().rank
    assert f"effective_rank={{'default': {rank}}}" in repr(model)


def test_it_begins_as_the_base():
    base = make_model()
    model = get_peft_model(copy.deepcopy(base), RasaConfig(r=RANK, rasa_alpha=3))
    assert torch.equal(model(TOKENS).logits, base(TOKENS).logits)
    for layer in layers(model).values():
        A, A_pool, *_, d = layer.adapter().factors()
        index = layer.adapter().spec.index
        torch.testing.assert_close(
            d.double(), oracle.initial_d(RANK, 1, 2, index, 3), rtol=1e-6, atol=0
        )
        for factor in (A, A_pool):
            assert 0.5 < factor.abs().max() * layer.base_layer.in_features**0.5 <= 1
    drawn = get_peft_model(copy.deepcopy(base), RasaConfig(r=RANK, init_weights=False))
    assert (drawn(TOKENS).logits - base(TOKENS).logits).abs().max() > 1e-3


def test_layers_to_transform_makes_smaller_pools():
    base = LLAMA.build()
    model = adapted(base, target_modules=["q_proj"], layers_to_transform=[0, 2])
    found = layers(plain(model))
    assert list(found) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 2)]
    assert all(layer.adapter().factors()[1].shape[0] == 2 for layer in found.values())
    check_step(LLAMA, base, plain(model), model)


EVERY_READER = [
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    {"layers_to_transform": [2]},
    {"exclude_modules": ["k_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"exclude_modules": r".*mlp.*"},
    {"rasa_groups": [["q_proj", "k_proj"]], "target_modules": ["q_proj", "k_proj"]},
    {"rank_pattern": {r".*q_proj": 2}},
    {"modules_to_save": ["norm"], "bias": "all", "trainable_token_indices": [3]},
    {"rasa_method": "lora", "rasa_k": None, "rasa_options": {"rslora": True}},
    {"rasa_start": "paper", "rasa_alpha": 3.0, "rasa_k": 2, "adapter_dtype": "bfloat16"},
]


@pytest.mark.parametrize("options", EVERY_READER, ids=str)
def test_every_reader_takes_what_is_saved(options, tmp_path):
    base = LLAMA.build()
    model = adapted(base, **options)
    model.save_pretrained(tmp_path)
    right = model.eval()(TOKENS).logits
    for read in (rasa_ext.load_adapter, PeftModel.from_pretrained):
        loaded = read(copy.deepcopy(base), str(tmp_path)).eval()
        torch.testing.assert_close(loaded(TOKENS).logits, right)


def test_conv1d_is_seen():
    model = adapted(GPT2.build(), target_modules=["c_attn"])
    assert model.peft_config["default"].fan_in_fan_out is True
    assert adapted(LLAMA.build()).peft_config["default"].fan_in_fan_out is False


ROWS = "trainable_token_indices"


UNFIT = [
    (LLAMA, {"target_modules": ["embed_tokens", "norm"]}, "embed_tokens.* is none; leave it out"),
    (LLAMA, {"target_modules": ["nothing"]}, "nothing"),
    (ATTENTION, {"target_modules": ["out_proj", "project"]}, "out_proj.*without calling"),
    (LLAMA, {"exclude_modules": r".*_proj"}, "leaves none"),
    (SEQUENTIAL, {"exclude_modules": ["0", "2", "4", "7", "6"]}, "leaves none"),
    (LLAMA, {"rank_pattern": {"q_proj": 8, "w_q": 2}}, "w_q"),
    (LLAMA, {"rasa_groups": "q_proj"}, "^rasa_groups: expected a sequence of patterns"),
    (LLAMA, {"rasa_groups": ["q"]}, "^rasa_groups: .* none ends in 'q'"),
    (LLAMA, {ROWS: [32]}, f"{ROWS}: .*below 32"),
    (LLAMA, {ROWS: {"wte": [1]}}, f"{ROWS}: .*no name ends in 'wte'"),
    (LLAMA, {ROWS: [1], "modules_to_save": ["embed_tokens"]}, f"{ROWS}: .*trained in full"),
    (GPT2, {ROWS: [1], "target_modules": ["c_attn", "lm_head"]}, f"{ROWS}: .*adapts 'lm_head'"),
    (TIED, {ROWS: [1]}, f"{ROWS}: .*which PEFT does not know"),
    (BERT, {ROWS: {"classifier": [1]}}, f"{ROWS}: .*which PEFT leaves out"),
]


@pytest.mark.parametrize(("entry", "options", "message"), UNFIT)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_adapted_is_named_and_nothing_changes(entry, options, message):
    model = entry.build()
    refused(lambda: get_peft_model(model, RasaConfig(r=RANK, **options)), model, message)


def test_dropout_is_on_the_adapters_input_in_training_only():
    model = tiny(rasa_dropout=0.5)
    model.eval()
    still = model(TOKENS).logits
    assert torch.equal(model(TOKENS).logits, still)
    model.train()
    assert not torch.equal(model(TOKENS).logits, model(TOKENS).logits)
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, make_model()(TOKENS).logits)


@sides("mixtral")
def test_copies_and_pickles_hold_their_own_adapters(side):
    model = side.one().eval()
    expected = model(side.tokens).logits
    for other in (copy.deepcopy(model), through_file(model)):
        assert torch.equal(other(side.tokens).logits, expected)
        with torch.no_grad():
            for p in trained(other).values():
                p.zero_()
        torch.testing.assert_close(other(side.tokens).logits, side.base()(side.tokens).logits)
        other.merge_adapter()
        assert torch.equal(other(side.tokens).logits, side.base()(side.tokens).logits)
        assert torch.equal(model(side.tokens).logits, expected)
        assert not any(owner.merged for owner in model.base_model.owners())


@pytest.mark.parametrize("by_names", [False, True])
@sides("mixtral")
def test_inject_adapter_in_model(side, by_names):
    """Injection leaves no tuner behind, so the layers must hold everything an adapter needs."""
    options = {**side.options, "target_modules": ["q_proj", side.up]}
    source = side.one(**options)
    state = get_peft_model_state_dict(source)
    given = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    names = {"state_dict": given} if by_names else {}
    model = inject_adapter_in_model(RasaConfig(**options), side.base(), **names)
    assert not isinstance(model, PeftModel)
    assert not set_peft_model_state_dict(model, given if by_names else state).unexpected_keys
    assert torch.equal(model(side.tokens).logits, source(side.tokens).logits)
    assert {f"base_model.model.{key}" for key in trained(model)} == set(trained(source))
    assert same_tensors(get_peft_model_state_dict(model), given)


def test_states_of_older_versions_are_refused():
    """The tuner, and before that the first layer, had the pools."""
    model = tiny()
    state = model.state_dict()
    for key, name in pools_in_files(model, "default").items():
        layer, _, field = key.rpartition(".rasa_pool_")
        inner = layer.removeprefix("base_model.model.").replace(".", "/")
        for older in (key, f"base_model.rasa_pools.{inner}.rasa_pool_{field}"):
            given = {**state, older: state[name]}
            refused(lambda given=given: model.load_state_dict(given, strict=False), model, "older")
