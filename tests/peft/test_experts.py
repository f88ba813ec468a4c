"""Mixtures of experts under PEFT: tensors, outputs and files equal those of ``patch_model``."""

import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.conversion import convert_to_lora
from torch import Tensor, nn

import rasa_ext
from rasa_ext.checkpoint.adapter import adapter_tensors, own_key, pool_key
from rasa_ext.patching.state import owners
from rasa_ext.peft import RasaConfig, RasaPeftExperts, RasaPeftExpertWeight, RasaPeftLinear
from tests.helpers import peft_sides
from tests.helpers.adapters import same_bits
from tests.helpers.experts import GROUPINGS
from tests.helpers.memory import Made
from tests.helpers.models import LLAMA
from tests.helpers.peft import changes, trained
from tests.helpers.peft_experts import TOKENS, close, dense, lively, moe, stacks, tuned, two
from tests.helpers.refusals import refused

FAMILIES = (*peft_sides.FAMILIES, "llama4_text")
"""The last says nothing of how the weights lie, (E, in, out), and is given no choices."""
pytestmark = peft_sides.needs_experts


def same_in_the_core(model: PeftModel, family: str) -> nn.Module:
    """Return a model from ``patch_model`` with the config and tensors of a PEFT model."""
    patched = rasa_ext.patch_model(moe(family), config=model.peft_config["default"].core())
    tensors, state = adapter_tensors(patched), get_peft_model_state_dict(model)
    assert tensors.keys() == state.keys()
    with torch.no_grad():
        for key, tensor in tensors.items():
            tensor.copy_(state[key])
    return patched.eval()


OPTIONS = [
    {"r": 2, "rasa_k": 2},
    {"rasa_k": 0},
    {"target_modules": ["gate_up_proj", "down_proj"]},
    {"target_modules": ["q_proj", "experts.down_proj"], "rasa_alpha": 3.0},
    {"rank_pattern": {"1.mlp.experts.down_proj": 5}, "rasa_dropout": 0.0},
    {"rasa_groups": {"every": ["gate_up_proj"]}},
]


@pytest.mark.parametrize(
    ("family", "grouping", "options"),
    [(family, grouping, {}) for family in FAMILIES for grouping in GROUPINGS]
    + [(FAMILIES[i % 3], GROUPINGS[i // 2 % 3], each) for i, each in enumerate(OPTIONS)],
    ids=str,
)
def test_a_step_and_a_merge_are_those_of_patch_model(family, grouping, options):
    """Results are bit-identical: both front ends share one implementation."""
    model = tuned(family, rasa_experts=grouping, **options)
    core = same_in_the_core(model, family)
    found, expected = (each.train()(TOKENS).logits for each in (model, core))
    assert torch.equal(found, expected)
    for logits in (found, expected):
        logits.square().sum().backward()
    gradients = gradients_of(core)
    assert len(gradients) == len(trained(model))
    for name, parameter in trained(model).items():
        gradient = gradients[name.removesuffix(".default")]
        assert torch.equal(parameter.grad, gradient), name
        assert gradient.any() or not gradient.numel()
    merged, expected = model.merge_and_unload(), rasa_ext.merge_and_unload(core)
    assert [type(each) for each in merged.modules()] == [type(each) for each in expected.modules()]
    weights = expected.state_dict()
    assert all(same_bits(weight, weights[name]) for name, weight in merged.state_dict().items())


def gradients_of(core: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a patched model, by the key of a trained tensor in a file."""
    found = {}
    for name, owner in owners(core):
        pool = owner.pool_tensors() if owner.spec.index == 0 else {}
        found.update((own_key(name, field), t.grad) for field, t in owner.own_tensors().items())
        found.update((pool_key(name, field), t.grad) for field, t in pool.items())
    return {key: grad for key, grad in found.items() if grad is not None}


@pytest.mark.parametrize(
    ("family", "grouping"), list(zip(FAMILIES, (*GROUPINGS, "shared"), strict=True))
)
def test_files_go_both_ways(family, grouping, tmp_path):
    model = tuned(family, rasa_experts=grouping)
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path / "peft")
    core = rasa_ext.load_adapter(moe(family), tmp_path / "peft").eval()
    assert torch.equal(core(TOKENS).logits, expected)
    rasa_ext.save_adapter(core, tmp_path / "core")
    for folder in ("peft", "core"):
        config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert config["rasa_experts"] == grouping
        for low_cpu_mem_usage in (False, True):
            with warnings.catch_warnings(action="error", category=UserWarning):
                again = PeftModel.from_pretrained(
                    moe(family), tmp_path / folder, low_cpu_mem_usage=low_cpu_mem_usage
                )
            assert torch.equal(again.eval()(TOKENS).logits, expected)
            assert not trained(again)
    again.load_adapter(tmp_path / "peft", "second")
    again.set_adapter("second")
    assert torch.equal(again(TOKENS).logits, expected)


TARGETS = [
    {"target_modules": ["q_proj", "gate_up_proj"]},
    {"target_modules": r".*\.1\..*(q|down)_proj"},
    {"exclude_modules": ["gate_up_proj", "k_proj"]},
    {"exclude_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    {"modules_to_save": ["gate"]},
]


@pytest.mark.parametrize("options", TARGETS, ids=str)
def test_targets_are_those_of_patch_model(options, tmp_path):
    """The router may be trained in full."""
    model = tuned(**options)
    core = rasa_ext.patch_model(moe(), config=RasaConfig(rasa_experts="shared", **options).core())
    layers = model.get_base_model().named_modules()
    found = {name for name, layer in layers if getattr(layer, "configs", None)}
    assert found == {name for name, _ in owners(core)}
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.add_(0.3 * torch.randn_like(parameter) * ("modules_to_save" in name))
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    core = rasa_ext.load_adapter(moe(), tmp_path).eval()
    rasa_ext.save_adapter(core, tmp_path / "core")
    for each in (core, PeftModel.from_pretrained(moe(), tmp_path / "core").eval()):
        assert torch.equal(each(TOKENS).logits, expected)
    close(model.merge_and_unload()(TOKENS).logits, expected)


def test_without_the_field_experts_stay_and_a_warning_names_it():
    base = moe()
    with pytest.warns(UserWarning, match=r"^rasa_experts: 4 stacked .*rasa_experts='shared'") as w:
        model = get_peft_model(base, RasaConfig(r=2))
    assert [each.filename for each in w if "rasa_experts" in str(each.message)] == [__file__]
    assert not stacks(model)
    assert type(base.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    with pytest.warns(UserWarning, match=r"^rasa_experts: 2 stacked .*down_proj"):
        get_peft_model(moe(), RasaConfig(r=2, target_modules=["q_proj", "down_proj"]))


def test_no_warning_where_experts_are_not_meant(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "rasa_experts|rasa_groups")
        model = get_peft_model(moe(), RasaConfig(r=2, target_modules=["q_proj"]))
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(moe(), tmp_path)
        get_peft_model(LLAMA.build(), RasaConfig(r=2))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=str)
def test_a_model_without_experts_is_refused(targets):
    model = LLAMA.build()
    config = RasaConfig(r=2, rasa_experts="shared", target_modules=targets)
    refused(lambda: get_peft_model(model, config), model, "experts: expected a model with stacked")


PARALLEL = {"parallel": True}


UNFIT = [
    ({"target_modules": ["q_proj"]}, r"^rasa_experts: .*names none; add them"),
    ({"target_modules": ["q_proj", "experts"]}, r"^rasa_experts: .*names none; add them"),
    ({"rasa_experts": None, "target_modules": ["gate_up_proj"]}, "^target_modules: .*only"),
    ({"rasa_groups": ["gate_down_proj"]}, "^rasa_groups: .*none ends in 'gate_down_proj'"),
    ({"rasa_experts": None, "target_modules": ["embed_tokens"]}, "embed_tokens.* is none"),
    (PARALLEL, r"^experts: 'model\.layers\.1.*expert parallelism"),
    ({**PARALLEL, "target_modules": ["gate_up_proj"]}, "^experts: .*expert parallelism"),
]


@pytest.mark.parametrize(("options", "said"), UNFIT)
@pytest.mark.filterwarnings("ignore:rasa_experts")
def test_what_does_not_fit_is_refused(options, said):
    model = moe()
    options = dict(options)
    model.model.layers[1].mlp.experts._is_expert_parallel = options.pop("parallel", False)
    config = RasaConfig(**{"r": 2, "rasa_experts": "shared", **options})
    refused(lambda: get_peft_model(model, config), model, said)


def test_the_gradients_of_a_sum_are_those_of_its_parts():
    """A second active adapter that changes nothing does not affect the first one's gradients."""
    model = two()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(".third"):
                parameter.mul_(0 if key.endswith("_B.third") else 1)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(TOKENS).logits.square().sum().backward()
        return {key: p.grad for key, p in trained(model).items() if key.endswith(".default")}

    alone = gradients()
    model.base_model.set_adapter(["third", "default"])
    torch.testing.assert_close(gradients(), alone, rtol=1e-5, atol=1e-6)


def test_each_adapter_has_its_rate_of_dropout():
    model = two(rasa_dropout=0.5)
    model.base_model.set_adapter(["default", "third"])
    close(model(TOKENS).logits, dense(model, "default", "third"))
    model.train()
    assert not torch.equal(model(TOKENS).logits, model(TOKENS).logits)
    model.set_adapter("third")
    assert torch.equal(model(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.filterwarnings("ignore:rasa_experts")
def test_a_second_adapter_that_leaves_experts_alone():
    model = tuned()
    before = dense(model, "default")
    with pytest.warns(UserWarning, match=r"^rasa_experts: 4 stacked"):
        model.add_adapter("second", RasaConfig(r=2))
    lively(model, "second").eval()
    assert not any("second" in stack.configs for stack in stacks(model).values())
    close(model(TOKENS).logits, before)
    model.set_adapter("second")
    close(model(TOKENS).logits, dense(model, "second"))
    third = RasaConfig(r=2, target_modules=["experts.down_proj"])
    said = r"^target_modules: .*names only stacked expert weights"
    refused(lambda: model.add_adapter("third", third), model, said)


ROWS = torch.cat([TOKENS, TOKENS.flip(0)])


def test_rows_of_several_adapters_are_refused():
    model = two()
    before = model(TOKENS).logits
    with pytest.raises(ValueError, match=r"^adapter_names: .*default, third adapts experts"):
        model(input_ids=ROWS, adapter_names=["third", "default", "__base__", "third"])
    assert torch.equal(model(TOKENS).logits, before)


def test_rows_of_adapters_of_linear_layers_see_the_bases_experts():
    model = tuned()
    model.add_adapter("second", RasaConfig(r=2, target_modules=["q_proj"]))
    lively(model, "second").eval()
    names = ["second", "__base__", "__base__", "second"]
    found = model(input_ids=ROWS, adapter_names=names).logits
    for row, (name, source) in enumerate(zip(names, [0, 1, 1, 0], strict=True)):
        close(found[row], dense(model, *({name} - {"__base__"}))[source])
    close(model(TOKENS).logits, dense(model, "default"))


def test_an_adapter_of_one_weight_merged_beside_an_active_one():
    """Merged weights use the merged adapter, other weights the active one, as in linear layers."""
    model = two()
    model.merge_adapter(["second"])
    merged = [name for name, stack in stacks(model).items() if stack.merged]
    assert merged == [f"model.layers.{layer}.mlp.experts.down_proj" for layer in (0, 1)]
    base = moe().requires_grad_(False)
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, RasaPeftLinear | RasaPeftExpertWeight):
            end = ".weight" if isinstance(module, RasaPeftLinear) else ""
            change = changes(module, "second" if module.merged else "default")
            base.get_parameter(f"{name}{end}").add_(change)
    close(model(TOKENS).logits, base(TOKENS).logits)


def test_merging_makes_no_tensor_of_a_whole_weight(monkeypatch):
    """Merging stores a chunked copy for unmerge; unloading stores none."""
    monkeypatch.setattr("rasa_ext.patching.parts.CHUNK_BYTES", 1)
    model = tuned(target_modules=["gate_up_proj", "down_proj"])
    one = max(stack.weight[0].numel() for stack in stacks(model).values())
    for call in (model.merge_adapter, model.unmerge_adapter, model.merge_and_unload):
        with Made() as made:
            call()
        assert max(made.sizes, default=0) <= one


def test_it_is_no_lora_of_peft():
    with pytest.raises(TypeError, match=r"do not support LoRA conversion.*RasaPeftExpertWeight"):
        convert_to_lora(tuned(), rank=4)


def test_casts_and_moves_are_seen():
    """After a cast the new tensors are used; over a half-precision base the adapter is float32."""
    model = tuned(dtype=torch.float32)
    with torch.no_grad():
        before = model(TOKENS).logits
        model.double()
        close(model(TOKENS).logits, dense(model, "default"))
        model.float()
        torch.testing.assert_close(model(TOKENS).logits, before)
    half = get_peft_model(moe(dtype=torch.bfloat16), RasaConfig(r=2, rasa_experts="slot"))
    assert {p.dtype for p in trained(half).values()} == {torch.float32}
    assert half(TOKENS).logits.dtype == torch.bfloat16


def test_fresh_adapters_change_nothing_and_drawn_ones_do():
    fresh = get_peft_model(moe(), RasaConfig(r=2, rasa_experts="layer"))
    torch.testing.assert_close(fresh(TOKENS).logits, moe()(TOKENS).logits)
    drawn = get_peft_model(moe(), RasaConfig(r=2, rasa_experts="layer", init_weights=False))
    for stack in stacks(drawn).values():
        B = stack.rasa_B["default"]
        assert 0.5 < B.abs().max() <= 1  # rank one: uniform in +-1 for every expert
        assert all(each.any() for each in B)
    assert isinstance(drawn.get_base_model().model.layers[0].mlp.experts, RasaPeftExperts)
