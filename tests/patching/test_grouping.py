"""Groups of layers that share a pool; shapes, initial values and owners of adapter tensors."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

import rasa_ext
from rasa_ext.peft import RasaConfig
from tests.helpers import oracle
from tests.helpers.adapters import RANK, adapted_layers, pool_members
from tests.helpers.models import EVERY, EXPERTS, LLAMA, SEQUENTIAL, T5, TWO_NAMES, ids

SPLITS = [0, 1, RANK // 2, RANK]
_LLAMA_8B = {
    f"model.layers.{layer}.{path}": shape
    for layer in range(32)
    for path, shape in {
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    }.items()
}


def nested(shapes: dict[str, tuple[int, int]], device: str = "cpu") -> nn.Module:
    """Build a tree of modules with linear layers (out, in) at the given paths."""
    root = nn.Module()
    for name, (out, width) in shapes.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(last, nn.Linear(width, out, device=device))
    return root


def plain_shapes(model: nn.Module, names) -> dict[str, tuple[int, int]]:
    return {name: oracle.weight_shape(model.get_submodule(name)) for name in names}


@pytest.mark.parametrize("entry", [*EVERY, EXPERTS], ids=ids)
@pytest.mark.filterwarnings("ignore:.*3-D")
def test_models(entry):
    """Every linear layer except heads is adapted, and shares a pool with its group's layers."""
    base = entry.build()
    model = rasa_ext.patch_model(copy.deepcopy(base), RANK, 1)
    groups = oracle.groups(plain_shapes(base, entry.targets(base)))
    assert pool_members(model) == set(map(frozenset, groups))


NAMES = [
    (["h.0.c", "h.1.c", "h.11.c"], [["h.0.c", "h.1.c", "h.11.c"]]),
    (["0", "1"], [["0", "1"]]),
    (["0.l.0.q", "0.l.1.q"], [["0.l.0.q", "0.l.1.q"]]),
    (["0.l.0.q", "0.l.1.q", "1.q"], [["0.l.0.q", "0.l.1.q"], ["1.q"]]),
    (["0.l.0.q", "0.l.1.q", "1.l.0.q"], [["0.l.0.q", "1.l.0.q"], ["0.l.1.q"]]),
    (["0.l.3.e.0.q", "0.l.3.e.1.q"], [["0.l.3.e.0.q", "0.l.3.e.1.q"]]),
    (["block.0.layer.1.q", "block.1.layer.1.q"], [["block.0.layer.1.q", "block.1.layer.1.q"]]),
    (["encoder.0.q", "decoder.0.q"], [["encoder.0.q"], ["decoder.0.q"]]),
    (["head", "body"], [["head"], ["body"]]),
    (["layer1.fc", "layer2.fc"], [["layer1.fc"], ["layer2.fc"]]),
    (["m.0.w1", "m.0.w2", "m.1.w1"], [["m.0.w1", "m.1.w1"], ["m.0.w2"]]),
    ({"l.0.up": (4, 6), "l.1.up": (4, 6), "l.2.up": (8, 6)}, [["l.0.up", "l.1.up"], ["l.2.up"]]),
    ({"l.0.up": (4, 6), "l.1.up": (4, 8)}, [["l.0.up"], ["l.1.up"]]),
]


@pytest.mark.parametrize(("names", "expected"), NAMES)
def test_names(names, expected):
    shapes = names if isinstance(names, dict) else dict.fromkeys(names, (4, 4))
    assert sorted(oracle.groups(shapes)) == sorted(expected)
    model = rasa_ext.patch_model(nested(shapes), 2, 1)
    assert pool_members(model) == set(map(frozenset, expected))


@pytest.mark.parametrize("k", SPLITS)
@pytest.mark.parametrize("entry", [LLAMA, T5, SEQUENTIAL], ids=ids)
def test_shapes_and_counts(entry, k):
    base = entry.build()
    shapes = plain_shapes(base, entry.targets(base))
    model = rasa_ext.patch_model(base, RANK, k)
    layers = adapted_layers(model)
    for names in oracle.groups(shapes):
        out, width = shapes[names[0]]
        pooled = len(names) * k
        for layer in map(layers.get, names):
            assert layer.A.shape == (RANK - k, width)
            assert layer.B.shape == (out, RANK - k)
            assert layer.d.shape == (RANK - k + pooled,)
            if k == 0:
                assert layer.pool is None
            else:
                assert layer.pool.A.shape == (pooled, width)
                assert layer.pool.B.shape == (out, pooled)
    trainable = [p for p in model.parameters() if p.requires_grad]
    listed = rasa_ext.adapter_parameters(model)
    assert isinstance(listed, list)
    assert sorted(map(id, trainable)) == sorted(map(id, listed))  # each once
    assert sum(p.numel() for p in trainable) == oracle.trainable_count(shapes, RANK, k)


@pytest.mark.parametrize(
    ("rank", "k", "published"), [(8, 1, 20_980_256), (16, 2, 41_960_512), (32, 4, 83_921_024)]
)
def test_published_counts_of_an_8b_model(rank, k, published):
    assert oracle.trainable_count(_LLAMA_8B, rank, k) == published
    model = rasa_ext.patch_model(nested(_LLAMA_8B, "meta"), rank, k)
    assert sum(p.numel() for p in rasa_ext.adapter_parameters(model)) == published
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("start", ["lora", "paper"])
@pytest.mark.parametrize("alpha", [None, 32.0, 0.5])
@pytest.mark.parametrize("k", SPLITS)
def test_initial_values(k, alpha, start):
    base = nested({f"l.{i}.fc": (50, 400) for i in range(3)})
    model = rasa_ext.patch_model(base, RANK, k, alpha=alpha, start=start)
    alpha = alpha or {"lora": RANK, "paper": 8}[start]
    bound = 400**-0.5
    for index, layer in enumerate(adapted_layers(model).values()):
        expected = oracle.initial_d(RANK, k, 3, index, alpha, start)
        torch.testing.assert_close(layer.d.double(), expected, rtol=1e-6, atol=0)
        factors = [(layer.A, layer.B)]
        if layer.pool is not None:
            factors.append((layer.pool.A, layer.pool.B))
        for A, B in factors:
            assert not B.any()
            if A.numel():
                assert 0.9 * bound < A.abs().max() <= bound
                assert abs(A.std() / (bound / 3**0.5) - 1) < 0.1
    drawn = [p for p in rasa_ext.adapter_parameters(model) if p.any() and p.ndim == 2]
    assert len({p.flatten()[0].item() for p in drawn}) == len(drawn)


def test_the_seed_decides_the_draw():
    models = []
    for seed in (5, 5, 6):
        base = LLAMA.build()
        torch.manual_seed(seed)
        models.append(rasa_ext.adapter_parameters(rasa_ext.patch_model(base, RANK, 1)))
    for first, same, other in zip(*models, strict=True):
        assert torch.equal(first, same)
        drawn = first.ndim == 2 and bool(first.any())
        assert torch.equal(first, other) != drawn


@pytest.mark.parametrize("front", ["patch", "peft"])
@pytest.mark.parametrize("entry", [LLAMA, T5], ids=ids)
def test_parts_have_the_dtype_of_the_base(entry, front):
    """Code such as transformers' takes a module's dtype from the first parameter."""
    base = entry.build().bfloat16()
    parts = ["", *(name for name, _ in base.named_children())]
    before = {
        name: first.dtype
        for name in parts
        if (first := _first(base.get_submodule(name))) is not None
    }
    if front == "patch":
        rasa_ext.patch_model(base, RANK, 1)
    else:
        get_peft_model(base, RasaConfig(r=RANK))
    after = {name: _first(base.get_submodule(name)).dtype for name in before}
    assert after == before


def _first(module: nn.Module) -> torch.Tensor | None:
    return next(module.parameters(), None)


@pytest.mark.parametrize("entry", EVERY, ids=ids)
def test_every_parameter_has_one_place(entry):
    """Each parameter has one owner: its layer or, for a pool, what runs all layers of the group."""
    base = entry.build()
    plain = len(base.state_dict())
    model = rasa_ext.patch_model(base, RANK, 2)
    owned = [id(p) for module in model.modules() for p in module.parameters(recurse=False)]
    assert all(owned.count(id(p)) == 1 for p in rasa_ext.adapter_parameters(model))
    members: dict[rasa_ext.nn.RasaPool, list[str]] = {}
    for name, layer in adapted_layers(model).items():
        members.setdefault(layer.pool, []).append(name)
    homes = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    for pool, names in members.items():
        (home,) = {homes[id(tensor)] for tensor in pool.tensors().values()}
        home = next((each for each in model.modules() if home is pool in each.children()), home)
        assert home.forward.__func__ is not nn.Module.forward
        inside = dict(home.named_modules()).values()
        assert all(model.get_submodule(name) in inside for name in names)
        children = [list(child.modules()) for child in home.children()]
        assert not any(
            all(model.get_submodule(name) in child for name in names)
            and type(child[0]).forward is not nn.Module.forward
            for child in children
        )
        for name in "AB":
            assert getattr(pool, name) is pool.tensors()[name]
    if entry is not TWO_NAMES:  # the state dict has this layer twice
        assert len(model.state_dict()) == plain + len(rasa_ext.adapter_parameters(model))
