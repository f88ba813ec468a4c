"""import_lora: turn a LoRA saved by PEFT into a RaSA adapter with the same outputs."""

import copy
import functools

import pytest
import torch
from safetensors.torch import load_file, save_file

import rasa_ext
import rasa_ext.peft
from tests.helpers import oracle
from tests.helpers.adapter_folders import edit
from tests.helpers.adapters import adapted_layers, adapters
from tests.helpers.expert_files import RANK, adapted, build, stacks
from tests.helpers.expert_files import logits as logits_of
from tests.helpers.models import BERT, FAMILIES, GPT2, LLAMA, ids, logits, rounding
from tests.helpers.peft import WEIGHTS, load_in_peft, lora_changes, save_entry_lora
from tests.helpers.refusals import refused

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*stay untouched",
    "ignore:.*SGLang",
    "ignore:.*fan_in_fan_out",
    "ignore:.*tied",
    "ignore:.*embedding",
    "ignore:.*is_gradient_c",
)


PATTERNS = {
    "plain": {},
    "scaled": {"lora_alpha": 20},
    "rslora": {"use_rslora": True, "lora_alpha": 6},
    "alpha pattern": {"alpha_pattern": {"q_proj": 3, r".*\.layers\.1\.mlp\.up_proj": 30}},
    "rank pattern": {"rank_pattern": {"layers.0.self_attn.v_proj": 2, "o_proj": 9}},
    "all patterns": {
        "use_rslora": True,
        "rank_pattern": {"o_proj": 9},
        "alpha_pattern": {"o_proj": 3, "q_proj": 0},
    },
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "trained rows": {"trainable_token_indices": [5, 2]},
    "trained rows by name": {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [1, 2]}},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "the head too": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("k", [0, 1, 5])
@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
def test_a_lora_is_imported_exactly(options, k, tmp_path, figure):
    base, theirs = save_entry_lora(LLAMA, tmp_path / "lora", **options)
    before, expected = logits(LLAMA, base.eval()), logits(LLAMA, theirs)
    found = rasa_ext.import_lora(base, tmp_path / "lora", k)
    error = rounding(LLAMA, theirs)
    oracle.assert_close(logits(LLAMA, base.eval()), expected, error)
    assert (expected - before).abs().max() > 1e-2
    rank = k + max(a.A.shape[0] for a in adapters(base).values())
    assert (found.config.k, found.config.rank) == (k, rank)
    deltas = lora_changes(theirs)
    assert set(adapted_layers(base)) == set(deltas)
    rasa_ext.save_adapter(base, tmp_path / "again")
    again = rasa_ext.load_adapter(LLAMA.build(), tmp_path / "again")
    oracle.assert_close(logits(LLAMA, again.eval()), expected, error)
    figure(f"LoRA imported, k = {k}, {sorted(options)}: plain PyTorch's error {error:.1e}")


@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_lora_goes_on_at_the_rank_of_the_pool(k, tmp_path):
    base, theirs = save_entry_lora(LLAMA, tmp_path)
    rasa_ext.import_lora(base, tmp_path, k=k)
    by_peft = rasa_ext.peft.import_lora(LLAMA.build(), tmp_path, k)
    expected = lora_changes(theirs)
    for model in (base, by_peft.base_model.model):
        LLAMA.loss(model.train(), LLAMA.inputs(0))[1].backward()
        for name, adapter in adapters(model).items():
            torch.testing.assert_close(oracle.delta(adapter), expected[name], rtol=1e-6, atol=1e-6)
            assert adapter.d.shape == (5 - k + 3 * k,)
            assert all(p.grad.any() for p in (adapter.B_pool, adapter.A_pool))
            assert (adapter.d.grad != 0).all()
            own = adapter.d.detach() != 0
            assert torch.equal(adapter.d[own], adapter.d.new_full((5,), 8 / 5))


@pytest.mark.parametrize(("k", "kind"), [(6, ValueError), (-1, ValueError), (1.0, TypeError)])
def test_a_k_that_no_layer_can_give_is_refused(k, kind, tmp_path):
    base, _ = save_entry_lora(LLAMA, tmp_path)
    refused(lambda: rasa_ext.import_lora(base, tmp_path, k), base, "^k: ", kind=kind)


@pytest.mark.parametrize("entry", FAMILIES, ids=ids)
def test_families(entry, tmp_path):
    options = {"task_type": "SEQ_CLS"} if entry is BERT else {}  # which trains a head in full
    options |= {"fan_in_fan_out": entry is GPT2, "use_rslora": True}
    base, theirs = save_entry_lora(entry, tmp_path, **options)
    expected = logits(entry, theirs)
    rasa_ext.import_lora(base, tmp_path)
    error = rounding(entry, theirs)
    oracle.assert_close(logits(entry, base.eval()), expected, error)


def test_factors_dropout_and_scale_come_along(tmp_path):
    base, _ = save_entry_lora(LLAMA, tmp_path, lora_dropout=0.25, lora_alpha=20)
    rasa_ext.import_lora(base, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    for name, adapter in adapters(base).items():
        assert torch.equal(adapter.A, stored[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(adapter.B, stored[f"base_model.model.{name}.lora_B.weight"])
        assert adapter.d.tolist() == [4.0] * 5
    assert {layer.config.dropout for layer in adapted_layers(base).values()} == {0.25}
    again = rasa_ext.patch_model(LLAMA.build(), 5, 0, alpha=20)
    assert {tuple(a.d.tolist()) for a in adapters(again).values()} == {(4.0,) * 5}


def test_ranks_that_fill_up_can_be_trained(tmp_path):
    base, _ = save_entry_lora(LLAMA, tmp_path, rank_pattern={"q_proj": 2})
    rasa_ext.import_lora(base, tmp_path)
    LLAMA.loss(base.train(), LLAMA.inputs(0))[1].backward()
    layer = base.model.layers[0].self_attn.q_proj
    assert layer.B.shape[1] == 5
    assert layer.B.grad.abs().amax(0).min() > 0


@pytest.mark.parametrize("half", [False, True])
def test_other_files(half, tmp_path):
    """A .bin file, keys that contain the adapter's name, and half precision load, too."""
    base, _ = save_entry_lora(LLAMA, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    if half:
        stored = {key: tensor.bfloat16() for key, tensor in stored.items()}
    (tmp_path / WEIGHTS).unlink()
    renamed = {key.replace(".weight", ".default.weight"): t for key, t in stored.items()}
    torch.save(renamed, tmp_path / "adapter_model.bin")
    rasa_ext.import_lora(base, tmp_path)
    for name, adapter in adapters(base).items():
        B, A = (stored[f"base_model.model.{name}.lora_{p}.weight"].double() for p in "BA")
        torch.testing.assert_close(oracle.delta(adapter), B @ A * (8 / 5), rtol=1e-6, atol=1e-9)


VARIANTS = ("use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens")
VARIANTS += ("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config")


def refuse(base, directory, message, kind=ValueError):
    refused(lambda: rasa_ext.import_lora(base, directory), base, message, kind=kind)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *(({n: True}, rf"plain LoRA, but .*{n}.*merge_and_unload") for n in VARIANTS),
        ({"peft_type": "VERA"}, "expected peft_type 'LORA' .* got 'VERA'"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conver"),
        ({"use_rslora": [0]}, "use_rslora"),
        ({"lora_alpha": False}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_are_refused(values, message, tmp_path):
    base, _ = save_entry_lora(LLAMA, tmp_path)
    edit(tmp_path, **values)
    refuse(base, tmp_path, message, (ValueError, TypeError))


def test_tensors_that_are_refused(tmp_path):
    base, _ = save_entry_lora(LLAMA, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    first = next(iter(stored)).rpartition(".lora_")[0]
    A, B = f"{first}.lora_A.weight", f"{first}.lora_B.weight"
    elsewhere = {key.replace("layers", "blocks"): t for key, t in stored.items()}
    for spoil, message in [
        (stored | {f"{first}.lora_magnitude_vector": torch.ones(3)}, "lora_A and lora_B of linear"),
        (stored | {f"{first}.lora_embedding_A": torch.ones(3)}, "lora_A and lora_B of linear"),
        ({key: t for key, t in stored.items() if key != B}, "lora_B is missing"),
        (stored | {A: torch.ones(5, 24, 1, 1)}, "convolutions are not supported"),
        (stored | {A: torch.ones(4, 24)}, r"lora_A \(r, in\) and lora_B"),
        (stored | {A: torch.ones(5, 23)}, r"\(out, in\) \(\d+, \d+\) .*got \(\d+, 23\)"),
        (elsewhere, "not in the model"),
        ({"base_model.model.model.norm.weight": torch.ones(24)}, "found none"),
        (stored | {"base_model.model.model.gone.weight": torch.ones(2)}, "has no 'model.gone'"),
        (stored | {"base_model.model.model.norm.weight": torch.ones(2)}, "of another shape"),
    ]:
        save_file(spoil, tmp_path / WEIGHTS)
        refuse(base, tmp_path, message)
    (tmp_path / WEIGHTS).unlink()
    refuse(base, tmp_path, "missing", FileNotFoundError)


stacked = functools.cache(build)


@pytest.mark.parametrize("layout", ["peft", "per-expert", "shared-outer"])
def test_import_lora_refuses_experts(layout, tmp_path):
    """No layout is mistaken for a LoRA of linear layers, not even partly."""
    model = adapted(stacked("mixtral"), "shared", RANK)
    rasa_ext.export_lora(model, tmp_path, expert_layout=layout)
    refuse(copy.deepcopy(stacked("mixtral")), tmp_path, "experts")


@pytest.mark.parametrize(("family", "beside"), [("mixtral", False), ("deepseek_v3", True)])
def test_import_lora_of_linear_layers(family, beside, tmp_path):
    """Linear layers load, too, if the config lists them in target_parameters."""
    plain = stacked(family, beside=beside)
    model = adapted(plain, None)
    rasa_ext.export_lora(model, tmp_path)
    found = copy.deepcopy(plain)
    rasa_ext.import_lora(found, tmp_path)
    assert not stacks(found)
    error = oracle.rounding(load_in_peft(plain, tmp_path), logits_of)
    oracle.assert_close(logits_of(found), logits_of(model), error)
