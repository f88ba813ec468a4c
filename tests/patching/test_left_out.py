"""Layers that "all-linear" skips, and the reasons in ``summary``."""

import copy
import functools
import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from peft import get_peft_model
from torch import nn

import rasa_ext
from rasa_ext.nn import RasaLinear
from rasa_ext.nn.adapted_linear import AdaptedLinear
from rasa_ext.peft import RasaConfig
from tests.helpers import experts, oracle
from tests.helpers.expert_files import adapted, logits
from tests.helpers.refusals import refused

pytestmark = pytest.mark.filterwarnings("ignore:.*stay untouched")

OTHER_FORWARD = {
    "phimoe": ["mlp.router"],
    "llama4_text": ["feed_forward.router"],
    "deepseek_v4": ["self_attn.o_a_proj"],
}
CALLED = Version(transformers.__version__) >= Version("5.25")
"""Whether falcon-mamba calls the layers that it read before."""
READ = {
    "mamba": ["mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"],
    "falcon_mamba": ["mixer.dt_proj", *([] if CALLED else ["mixer.x_proj", "mixer.out_proj"])],
    "jamba": ["mamba.dt_proj"],
}
ROUTERS = {
    "gemma4_text": ["router.proj"],
    "hunyuan_v1_moe": ["mlp.gate.wg"],
    "afmoe": ["mlp.router.gate"],
    "zaya": ["gate.down_proj", "router_mlp.fc1", "router_mlp.fc2", "router_mlp.out_proj"],
    "jetmoe": ["mlp.router.layer", "experts.router.layer"],
    "dbrx": ["ffn.router.layer"],
    "doge": ["mlp.router_gate"],
    "qwen2_moe": ["mlp.shared_expert_gate"],
}
REST = {
    "dbrx": ["ffn.experts.mlp.w1", "ffn.experts.mlp.v1", "ffn.experts.mlp.w2"],
    "doge": ["mlp.down_embed.weight", "mlp.up_embed.weight"],
    "mixtral": ["mlp.gate.weight", "experts.gate_up_proj", "experts.down_proj"],
    "jetmoe": ["mlp.input_linear.weight", "mlp.output_linear.weight"],
}


def left_out(model, suffixes):
    """Return the reasons for skipping layers with these suffixes, after checking that all exist."""
    skipped = rasa_ext.summary(model).skipped
    found = {s: {skipped[n] for n in skipped if n.endswith(f".{s}")} for s in suffixes}
    assert all(found.values()), skipped
    return set().union(*found.values())


@pytest.mark.parametrize(("family", "names"), {**OTHER_FORWARD, **READ}.items())
def test_what_cannot_be_adapted(family, names):
    """Other layers are adapted: each adapter parameter gets a gradient, and merging works."""
    base = experts.model(family).eval()
    model = adapted(base, None)
    word = "without calling the layer" if family in READ else "does not compute x W"
    assert all(word in reason for reason in left_out(model, names))
    mixers = [name for name in rasa_ext.summary(model).skipped if ".mixer." in name]
    assert all(name.endswith(tuple(names)) for name in mixers)
    expected = logits(model)
    model(input_ids=torch.arange(24).view(2, 12)).logits.sum().backward()
    assert all(p.grad is not None for p in rasa_ext.adapter_parameters(model))
    plain = rasa_ext.merge_and_unload(model)
    oracle.assert_close(logits(plain), expected, oracle.rounding(plain, logits))
    call = functools.partial(rasa_ext.patch_model, base, target_modules=names[:1])
    refused(call, base, f"^target_modules: .*{names[0]}", word)


class OwnForward(nn.Linear):
    """A linear layer with a forward like Falcon's."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_forward_of_its_own_that_computes_the_same_is_adapted(device):
    model = nn.Sequential(OwnForward(6, 4), nn.Linear(4, 4)).to(device)
    rasa_ext.patch_model(model, 2, 0)
    assert isinstance(model[0], rasa_ext.RasaLinear)


def test_a_forward_of_its_own_that_computes_another_function_is_not():
    model = rasa_ext.patch_model(nn.Sequential(Scaled(6, 4), nn.Linear(4, 4)), 2, 0)
    assert rasa_ext.summary(model).skipped == {"0": "a Scaled, which does not compute x W^T + bias"}


class Patches(nn.Module):
    """A model as timm's, in which a convolution has the name of a linear layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.ModuleDict({"proj": nn.Conv2d(3, 8, 4)})
        self.blocks = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(8, 8)}) for _ in range(2))

    def forward(self, x):
        x = self.embed["proj"](x).mean((2, 3))
        for block in self.blocks:
            x = x + block["proj"](x)
        return x


def by_peft(model, **options):
    return get_peft_model(model, RasaConfig(r=2, rasa_k=1, **options)).base_model


@pytest.mark.parametrize("adapt", [functools.partial(rasa_ext.patch_model, rank=2, k=1), by_peft])
def test_a_name_that_a_convolution_has_too(adapt):
    """Its linear layers are adapted, and a warning says so once, unless it is excluded."""
    with pytest.warns(UserWarning, match=r"^target_modules: 'embed.proj' is not a linear layer"):
        model = adapt(Patches(), target_modules=["proj"])
    assert sum(isinstance(module, AdaptedLinear) for module in model.modules()) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(Patches(), target_modules=["proj"], exclude_modules=["embed.proj"])


class Reads(nn.Module):
    """A module that uses each layer differently; layers in ``names`` cannot be adapted."""

    names = ("product", "functional", "later", "part")

    def __init__(self):
        super().__init__()
        for name in (*self.names, "called", "sliced", "asked"):
            setattr(self, name, nn.Linear(4, 4, bias=False))
        nn.init.ones_(self.called.weight)

    def forward(self, x):
        if isinstance(self.asked.weight, torch.Tensor) and x.dtype == self.asked.weight.dtype:
            x = self.asked(x.to(self.asked.weight))
        x = self.called(x) @ self.product.weight
        if x.shape[0] > 100:
            return nn.functional.linear(x[:, :2], self.sliced.weight[:, :2])
        return self.more(self.sliced(x))

    def more(self, x):
        weight = self.later.weight
        return (
            nn.functional.linear(x, weight=self.functional.weight) @ weight @ self.part.weight.t()
        )

    def unused(self, x):
        return x @ self.called.weight


def test_layers_whose_weight_is_read_are_found_in_the_code():
    model = rasa_ext.patch_model(nn.ModuleDict({"reads": Reads()}), 2, 0)
    reason = "Reads reads the weight without calling the layer"
    skipped = rasa_ext.summary(model).skipped
    assert skipped == {f"reads.{name}": reason for name in Reads.names}


@pytest.fixture
def kernelized(monkeypatch):
    """gpt-oss as loaded with use_kernels=True: a kernel of the hub replaces the MLPs' forward."""
    base = experts.model("gpt_oss")
    base._use_kernels = True
    kind = type(base.model.layers[0].mlp)
    monkeypatch.setattr(kind, "kernel_layer_name", "MegaBlocksMoeMLP", raising=False)
    return base


def test_experts_that_a_kernel_reads(kernelized):
    """Experts are refused if a kernel reads their weights without calling them."""
    reason = "GptOssMLP runs a kernel that reads it; load without use_kernels"
    named = RasaConfig(r=2, rasa_experts="shared", target_modules=["q_proj", "experts.down_proj"])
    for call in (
        lambda: rasa_ext.patch_model(kernelized, 2, 1, experts="shared"),
        lambda: get_peft_model(kernelized, RasaConfig(r=2, rasa_experts="shared")),
        lambda: get_peft_model(kernelized, named),
    ):
        refused(call, kernelized, reason)
    assert isinstance(adapted(kernelized, None).model.layers[0].self_attn.q_proj, RasaLinear)


@pytest.mark.parametrize(("family", "names"), ROUTERS.items())
def test_routers_are_adapted_only_where_they_are_named(family, names):
    base = experts.model(family)
    model = rasa_ext.patch_model(copy.deepcopy(base), 2, 0)
    assert left_out(model, names) == {"a router or gate of experts, taken only if named"}
    rasa_ext.patch_model(base, 2, 0, target_modules=names)
    adapted = {n for n, m in base.named_modules() if isinstance(m, rasa_ext.RasaLinear)}
    assert all(any(each.endswith(f".{name}") for each in adapted) for name in names)


@pytest.mark.parametrize(("family", "names"), REST.items())
def test_what_holds_weights_and_is_no_linear_layer_is_named(family, names):
    model = experts.model(family)
    with pytest.warns(UserWarning, match=r"weights of experts, \d+ % of .* stay untouched"):
        rasa_ext.patch_model(model, 2, 0)
    assert all("weights of shape (" in reason for reason in left_out(model, names))
    assert ("the argument experts" in str(rasa_ext.summary(model))) == (family == "mixtral")
