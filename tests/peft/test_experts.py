"""Mixtures of experts under PEFT: the same tensors, numbers and files as ``patch_model`` has."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.lora.conversion import convert_to_lora
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rasa_ext
from rasa_ext import ops
from rasa_ext.checkpoint.adapter import adapter_tensors, own_key, pool_key
from rasa_ext.patching.state import owners
from rasa_ext.patching.subtraction import MergeResidual
from rasa_ext.peft import RasaConfig, RasaPeftExperts, RasaPeftExpertWeight, RasaPeftLinear
from tests.helpers import experts as mixtures
from tests.helpers.adapters import same_bits
from tests.helpers.models import LLAMA
from tests.helpers.peft import adapted, changes, trained
from tests.helpers.peft import logits as logits_of
from tests.helpers.peft_experts import TOKENS, close, dense, lively, moe, stacks, tuned, two
from tests.helpers.peft_sides import FAMILIES, needs_experts
from tests.helpers.refusals import Snapshot, refused
from tests.peft.test_training import train

GROUPINGS = ("slot", "layer", "shared")
UP, DOWN = (f"model.layers.{{}}.mlp.experts.{name}_proj" for name in ("gate_up", "down"))
STACKS = {form.format(layer) for form in (UP, DOWN) for layer in (0, 1)}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
pytestmark = needs_experts


def same_in_the_core(model: PeftModel, family: str = "mixtral") -> nn.Module:
    """``patch_model`` by the same config and with the same tensors, under the same names."""
    dtype = next(model.get_base_model().model.embed_tokens.parameters()).dtype
    patched = rasa_ext.patch_model(moe(family, dtype), config=model.peft_config["default"].core())
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
def test_a_step_is_that_of_patch_model(family, grouping, options):
    """To the bit: there is one implementation under both."""
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


def gradients_of(core: nn.Module) -> dict[str, Tensor]:
    """The gradients of a patched model, by the keys that its tensors have in a file."""
    found = {}
    for name, owner in owners(core):
        pool = owner.pool_tensors() if owner.spec.index == 0 else {}
        found.update((own_key(name, field), t.grad) for field, t in owner.own_tensors().items())
        found.update((pool_key(name, field), t.grad) for field, t in pool.items())
    return found


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_files_go_both_ways(family, grouping, tmp_path):
    model = tuned(family, rasa_experts=grouping)
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path / "peft")
    core = rasa_ext.load_adapter(moe(family), tmp_path / "peft").eval()
    assert torch.equal(core(TOKENS).logits, expected)
    rasa_ext.save_adapter(core, tmp_path / "core")
    for folder in ("peft", "core"):
        assert json.loads((tmp_path / folder / "adapter_config.json").read_text())[
            "rasa_experts"
        ] == grouping  # fmt: skip
        for low_cpu_mem_usage in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                again = PeftModel.from_pretrained(
                    moe(family), tmp_path / folder, low_cpu_mem_usage=low_cpu_mem_usage
                )
            assert torch.equal(again.eval()(TOKENS).logits, expected)
            assert not trained(again)
    again.load_adapter(tmp_path / "peft", "second")
    again.set_adapter("second")
    assert torch.equal(again(TOKENS).logits, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "gate_up_proj"]},
        {"target_modules": r".*\.1\..*(q|down)_proj"},
        {"exclude_modules": ["gate_up_proj", "k_proj"]},
        {"exclude_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        {"modules_to_save": ["gate"]},
    ],
    ids=str,
)
def test_targets_are_those_of_patch_model(options, tmp_path):
    model = tuned(**options)
    core = rasa_ext.patch_model(moe(), config=RasaConfig(rasa_experts="shared", **options).core())
    found = {name for name, layer in model.get_base_model().named_modules() if has_one(layer)}
    assert found == {name for name, _ in owners(core)}
    model.save_pretrained(tmp_path)
    again = rasa_ext.load_adapter(moe(), tmp_path).eval()
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def has_one(layer: nn.Module) -> bool:
    return bool(getattr(layer, "configs", None))


def test_the_base_is_frozen_and_every_number_counted_once(capsys):
    base = sum(p.numel() for p in moe().parameters())
    model = tuned()
    assert stacks(model).keys() == STACKS
    assert all(".rasa_" in name for name in trained(model))
    expected = sum(t.numel() for t in get_peft_model_state_dict(model).values())
    assert model.get_nb_trainable_parameters() == (expected, base + expected)
    model.print_trainable_parameters()
    assert f"trainable params: {expected:,} || all params" in capsys.readouterr().out
    status = model.get_model_status()
    assert (status.active_adapters, status.merged_adapters) == (["default"], [])
    assert status.num_adapter_layers == len(STACKS) + 8
    assert f"RasaPeftExpertWeight(\n  effective_rank={{'default': {3 - 1 + 2}}}" in repr(
        stacks(model)[DOWN.format(0)]
    )


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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rasa_experts": "slots"}, "^rasa_experts: expected None or 'slot' or"),
        (
            {"rasa_experts": "slot", "rasa_method": "lora"},
            "^rasa_experts: expected None or 'own', got",
        ),
    ],
)
def test_bad_fields(options, said):
    with pytest.raises(ValueError, match=said):
        RasaConfig(**options)
    with pytest.raises(TypeError, match="argument 'experts'; did you mean rasa_experts"):
        RasaConfig(experts="slot")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": ["q_proj"]}, r"^rasa_experts: .*names none; add them"),
        ({"target_modules": ["q_proj", "experts"]}, r"^rasa_experts: .*names none"),
        ({"rasa_experts": None, "target_modules": ["gate_up_proj"]}, "^target_modules: .*alone"),
        ({"rasa_groups": ["gate_down_proj"]}, "^rasa_groups: .*none ends in 'gate_down_proj'"),
        ({"target_modules": ["gate_up_proj", "embed_tokens"]}, "embed_tokens.* is a Embedding"),
    ],
)
@pytest.mark.filterwarnings("ignore:rasa_experts")
def test_what_does_not_fit_is_refused(options, said):
    model = moe()
    config = RasaConfig(**{"r": 2, "rasa_experts": "shared", **options})
    refused(lambda: get_peft_model(model, config), model, said)


def test_a_model_without_experts_is_refused():
    model = LLAMA.build()
    call = lambda: get_peft_model(model, RasaConfig(r=2, rasa_experts="shared"))  # noqa: E731
    refused(call, model, "experts: expected a model with stacked experts", "leave out")
    config = RasaConfig(r=2, rasa_experts="shared", target_modules=["q_proj"])
    refused(lambda: get_peft_model(model, config), model, "expected a model with stacked experts")


@pytest.mark.parametrize("targets", ["all-linear", ["gate_up_proj", "down_proj"]], ids=str)
@pytest.mark.parametrize("kind", ["quantized", "parallel", "emptied"])
def test_experts_that_cannot_be_adapted(kind, targets):
    model = moe()
    experts = model.model.layers[1].mlp.experts
    if kind == "quantized":
        weight = torch.zeros(experts.down_proj.shape, dtype=torch.int8)
        experts.down_proj = nn.Parameter(weight, requires_grad=False)
    elif kind == "parallel":
        experts._is_expert_parallel = True
    else:
        experts.down_proj = nn.Parameter(torch.zeros(0))
    said = {"quantized": "dequantized", "parallel": "expert parallelism", "emptied": "gather"}
    config = RasaConfig(r=2, rasa_experts="shared", target_modules=targets)
    refused(
        lambda: get_peft_model(model, config),
        model,
        "^(experts|model): 'model.layers.1",
        said[kind],
    )
    assert all(parameter.requires_grad or kind == "quantized" for parameter in model.parameters())


def test_disabled_experts_compute_what_the_base_does():
    model, base = tuned(dtype=torch.float32), moe(dtype=torch.float32)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        for each in (model, base):
            each.config._experts_implementation = implementation
        with model.disable_adapter():
            assert torch.equal(model(TOKENS).logits, base(TOKENS).logits)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(TOKENS).logits, base(TOKENS).logits)
            assert not trained(model)
    assert len(trained(model)) == len(get_peft_model_state_dict(model))


def test_the_gradients_of_a_sum_are_those_of_its_parts():
    """An adapter beside one that changes nothing has the gradients that it has alone."""
    model = two()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(".third"):
                parameter.mul_(0 if ".rasa_B." in key or ".rasa_pool_B." in key else 1)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(TOKENS).logits.square().sum().backward()
        return {key: p.grad for key, p in trained(model).items() if key.endswith(".default")}

    alone = gradients()
    model.base_model.set_adapter(["third", "default"])
    for key, gradient in gradients().items():
        torch.testing.assert_close(gradient, alone[key], rtol=1e-5, atol=1e-6)


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
    snapshot = Snapshot(model)
    third = RasaConfig(r=2, target_modules=["experts.down_proj"])
    with pytest.raises(ValueError, match=r"^target_modules: .*stacked expert weights alone"):
        model.add_adapter("third", third)
    assert list(model.peft_config) == ["default", "second"]
    snapshot.assert_unchanged()


def test_trls_reference_is_a_copy_of_the_policy():
    model = tuned()
    model.add_adapter("ref", model.peft_config["default"])
    expected = model(TOKENS).logits
    model.set_adapter("ref")
    assert torch.equal(model(TOKENS).logits, expected)


def test_the_weights_of_an_adapter():
    found = stacks(two())
    downs = {DOWN.format(0), DOWN.format(1)}
    assert {name for name, stack in found.items() if "second" in stack.configs} == downs
    assert all({"default", "third"} <= stack.configs.keys() for stack in found.values())


BATCH, ROWS = {"input_ids": TOKENS}, torch.cat([TOKENS, TOKENS.flip(0)])


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


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_are_rounded_once(family, dtype, grouping):
    base, model = moe(family, dtype), tuned(family, dtype, rasa_experts=grouping)
    exact = {name: changes(stack) for name, stack in stacks(model).items()}
    core = rasa_ext.merge_and_unload(same_in_the_core(model, family))
    merged = model.merge_and_unload()
    assert type(merged) is type(base)
    for name, module in merged.named_modules():
        assert type(module) is type(base.get_submodule(name))
    for name, change in exact.items():
        weight, before = (each.get_parameter(name) for each in (merged, base))
        assert weight.dtype == dtype
        expected = before.double() + (change.mT if family == "gpt_oss" else change)
        # Half a step of the dtype, and the error of a float32 sum of some terms.
        bound = torch.finfo(dtype).eps * expected.abs() / 2 * 1.001 + 1e-6 * expected.abs().max()
        assert ((weight - expected).abs() <= bound).all()
        assert not same_bits(weight.detach(), before.detach())
        assert same_bits(weight.detach(), core.get_parameter(name).detach())


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("bytes_", [1, 4000, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_merging_and_back_is_exact(family, dtype, bytes_, subtract, monkeypatch):
    """Whatever is taken at a time, and whatever is kept."""
    monkeypatch.setattr("rasa_ext.patching.parts.CHUNK_BYTES", bytes_)
    model = tuned(family, dtype)
    model.add_adapter("second", RasaConfig(r=2, rasa_experts="slot", target_modules=["down_proj"]))
    lively(model, "second", 9).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if subtract and ".rasa_d." in key:
                parameter.mul_(1e-4)  # so that little is kept
    weights = {name: stack.weight.clone() for name, stack in stacks(model).items()}
    logits = model(TOKENS).logits
    if subtract:
        model.unmerge_by_subtracting()
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    one = {name: stack.weight.clone() for name, stack in stacks(model).items()}
    assert all(not same_bits(one[name], weights[name]) for name in one)
    kept = {type(each) for stack in stacks(model).values() for each in stack.merged_base.values()}
    assert kept == ({MergeResidual} if subtract else {Tensor})
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["second"])
    assert not same_bits(stacks(model)[DOWN.format(0)].weight.detach(), one[DOWN.format(0)])
    assert same_bits(stacks(model)[UP.format(0)].weight.detach(), one[UP.format(0)])
    model.unmerge_adapter()
    for name, stack in stacks(model).items():
        assert same_bits(stack.weight.detach(), weights[name].detach())
        assert not stack.merged
    assert torch.equal(model(TOKENS).logits, logits)


def test_an_adapter_of_one_weight_merged_beside_an_active_one():
    """As for linear layers: a merged weight has what was merged, the others what is active."""
    model = two()
    model.merge_adapter(["second"])
    downs = {DOWN.format(0), DOWN.format(1)}
    assert {name for name, stack in stacks(model).items() if stack.merged} == downs
    base = moe().requires_grad_(False)
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, RasaPeftLinear | RasaPeftExpertWeight):
            end = ".weight" if isinstance(module, RasaPeftLinear) else ""
            change = changes(module, "second" if module.merged else "default")
            base.get_parameter(f"{name}{end}").add_(change)
    close(model(TOKENS).logits, base(TOKENS).logits)


def test_a_merge_that_stops_midway_leaves_the_weight(monkeypatch):
    monkeypatch.setattr("rasa_ext.patching.parts.CHUNK_BYTES", 1)
    direct = ops.merge_group
    for subtract in (False, True):
        stack = stacks(tuned())[UP.format(0)]
        stack.merging.subtract, before, calls = subtract, stack.weight.clone(), []

        def failing(weights, Ap, Bp, calls=calls):
            direct(weights, Ap, Bp)
            calls.append(weights)
            if len(calls) == 4:
                raise MemoryError

        monkeypatch.setattr(ops, "merge_group", failing)
        with pytest.raises(MemoryError):
            stack.merge()
        assert same_bits(stack.weight.detach(), before.detach())
        assert not stack.merged


def test_merging_makes_no_tensor_of_a_whole_weight(monkeypatch):
    """What is kept for unmerging is a copy by chunks; unloading keeps none."""
    monkeypatch.setattr("rasa_ext.patching.parts.CHUNK_BYTES", 1)
    model = tuned(target_modules=["gate_up_proj", "down_proj"])
    weights = [stack.weight for stack in stacks(model).values()]
    one = max(weight[0].numel() for weight in weights)
    for call in (model.merge_adapter, model.unmerge_adapter, model.merge_and_unload):
        with Copies(*weights) as copied:
            call()
        assert max(copied.sizes, default=0) <= one


class Copies(TorchDispatchMode):
    """While entered: the elements of tensors that are no views of ``known`` ones."""

    def __init__(self, *known: Tensor):
        super().__init__()
        self.known, self.sizes = {t.untyped_storage().data_ptr() for t in known}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in (each for each in tree_leaves(result) if isinstance(each, Tensor)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.sizes.append(storage.nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_delta_weight_is_the_oracles(family, grouping):
    for stack in stacks(tuned(family, torch.float32, rasa_experts=grouping)).values():
        delta, exact = stack.get_delta_weight("default"), changes(stack)
        assert (delta.shape, delta.dtype) == (stack.weight.shape, torch.float32)
        exact = exact.mT if family == "gpt_oss" else exact
        torch.testing.assert_close(delta.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(family, reentrant):
    found = []
    for checkpointing in (False, True):
        model = tuned(family).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(TOKENS).logits.square().sum().backward()
        found.append({name: p.grad for name, p in trained(model).items()})
    # A re-entrant checkpoint adds a pool's gradients layer by layer.
    exact = {"rtol": 0, "atol": 0} if not reentrant else {}
    torch.testing.assert_close(*found, **exact)


def test_the_router_trained_in_full(tmp_path):
    model = tuned(modules_to_save=["gate"])
    gate = model.get_base_model().model.layers[0].mlp.gate
    assert [n for n, p in gate.named_parameters() if p.requires_grad] == [
        "modules_to_save.default.weight"
    ]
    before = model(TOKENS).logits
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.add_(0.3 * torch.randn_like(parameter) * ("modules_to_save" in name))
    expected = model(TOKENS).logits
    assert not torch.equal(expected, before)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(moe(), tmp_path).eval()
    assert torch.equal(again(TOKENS).logits, expected)
    core = rasa_ext.load_adapter(moe(), tmp_path).eval()
    assert torch.equal(core(TOKENS).logits, expected)
    rasa_ext.save_adapter(core, tmp_path / "core")
    again = PeftModel.from_pretrained(moe(), tmp_path / "core").eval()
    assert torch.equal(again(TOKENS).logits, expected)
    close(model.merge_and_unload()(TOKENS).logits, expected)


@pytest.mark.parametrize("reentrant", [None, False])
def test_a_resumed_run_has_identical_losses(reentrant, tmp_path):
    """Interrupted after three of six steps; and its checkpoints load everywhere."""
    wide = {"vocab_size": 320, "dtype": torch.float32, "rasa_experts": "slot"}
    whole, resumed = tuned(**wide), tuned(**wide)
    saving = {"save_strategy": "steps", "save_steps": 3}
    losses = train(whole, tmp_path, reentrant, **saving)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        for parameter in trained(resumed).values():
            parameter.zero_()
    checkpoint = str(tmp_path / "checkpoint-3")
    assert train(resumed, tmp_path / "again", reentrant, resume=checkpoint, **saving) == losses
    fresh = [moe(dtype=torch.float32, vocab_size=320) for _ in range(2)]
    ours = rasa_ext.load_adapter(fresh[0], tmp_path / "checkpoint-6")
    again = PeftModel.from_pretrained(fresh[1], tmp_path / "checkpoint-6")
    for other in (resumed, ours, again):
        assert torch.equal(logits_of(other, BATCH), logits_of(whole, BATCH))


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_experts_without_marks(grouping, tmp_path):
    """Llama 4's, whose weights lie as (E, in, out), and which are given no choices."""
    base = mixtures.model("llama4_text").eval()
    model = adapted(base, rasa_experts=grouping, task_type="CAUSAL_LM").eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(TOKENS).logits
        assert not torch.allclose(base(TOKENS).logits, expected, atol=1e-2)
        loaded = rasa_ext.load_adapter(copy.deepcopy(base), tmp_path).eval()
        torch.testing.assert_close(loaded(TOKENS).logits, expected)
        for name, stack in stacks(model).items():
            assert stack.get_delta_weight("default").shape == base.get_parameter(name).shape
        with model.disable_adapter():
            assert torch.equal(model(TOKENS).logits, base(TOKENS).logits)
        close(model.merge_and_unload()(TOKENS).logits, expected)


def test_it_is_no_lora_of_peft():
    with pytest.raises(TypeError, match=r"do not support LoRA conversion.*RasaPeftExpertWeight"):
        convert_to_lora(tuned(), rank=4)


def test_casts_and_moves_are_seen():
    """In half the adapter stays float32; what a cast replaces is not computed with."""
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
        assert 0.5 < B.abs().max() <= 1  # of rank one: uniform in +-1 for every expert
        assert all(each.any() for each in B)
    assert isinstance(drawn.get_base_model().model.layers[0].mlp.experts, RasaPeftExperts)


def test_merged_adapters_are_not_trained():
    model = tuned(rasa_experts="shared").train()
    model.merge_adapter()
    for module in model.modules():
        if isinstance(module, RasaPeftLinear):
            module.eval()  # raises before the experts
    with pytest.raises(RuntimeError, match=r"is merged .* unmerge_adapter\(\) of the PEFT model"):
        model(TOKENS)
    with torch.no_grad():
        model(TOKENS)
