"""compress_many: LoRAs over one basis, errors against dense float64 sums, and files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import rasa_ext
from rasa_research import solver, training
from tests.helpers import oracle
from tests.helpers.adapters import LargestTensor, adapters
from tests.helpers.models import LLAMA
from tests.helpers.refusals import refused

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OUT, WIDTH = 24, 20


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write(directory, factors, **config):
    """Write a LoRA in PEFT's format from (B, A) by layer, and return the directory."""
    directory.mkdir()
    tensors = {}
    for name, (B, A) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.contiguous()
    save_file(tensors, directory / WEIGHTS)
    rank = max(A.shape[0] for _, A in factors.values())
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["x"]}
    (directory / CONFIG).write_text(json.dumps(settings | config))
    return directory


def own(n, r, seed=0):
    """Return factors of n adapters with nothing in common."""
    return [(random(OUT, r, seed=9 * seed + i), random(r, WIDTH, seed=-i - 1)) for i in range(n)]


def written(tmp_path, changes):
    return [write(tmp_path / f"l{i}", {"x": pair}) for i, pair in enumerate(changes)]


def dense(pair):
    return pair[0].double() @ pair[1].double()


def common(n, rank, extra=0):
    """Return factors of n adapters over one basis of ``rank``, with ``extra`` private ranks."""
    B, A = random(OUT, rank, seed=1), random(rank, WIDTH, seed=2)
    return [
        (torch.cat([B * random(rank, seed=3 + i), Bi], 1), torch.cat([A, Ai]))
        for i, (Bi, Ai) in enumerate(own(n, extra, seed=7))
    ]


@pytest.mark.parametrize(("n", "rank"), [(2, 5), (4, 12), (6, 20)])
def test_a_common_basis_is_found(n, rank, tmp_path):
    changes = common(n, rank)
    found = solver.compress_many(written(tmp_path, changes), rank)
    assert found.errors.total < 1e-5 < found.separate.total
    for i, pair in enumerate(changes):
        near = found.loras.layers["x"].delta(i).double()
        torch.testing.assert_close(near, dense(pair), rtol=0, atol=1e-4)


def test_errors_are_those_of_dense_matrices(tmp_path):
    """All adapters count equally, also one with larger changes in one of its two layers."""
    n, rank = 3, 6
    layers = {
        "a.x": common(n, 3, 3),
        "b.x": [(100 * i * B, A) for i, (B, A) in enumerate(own(n, 6), 1)],
    }
    paths = [
        write(tmp_path / name, {layer: pairs[i] for layer, pairs in layers.items()})
        for i, name in enumerate("uvw")
    ]
    found = solver.compress_many(paths, rank)
    whole = {k: [dense(p).square().sum().item() for p in pairs] for k, pairs in layers.items()}
    weights = [1 / sum(whole[k][i] for k in layers) for i in range(n)]
    lost, apart = {}, {}
    for k, pairs in layers.items():
        near = [found.loras.layers[k].delta(i).double() for i in range(n)]
        lost[k] = [(dense(p) - m).square().sum().item() for p, m in zip(pairs, near, strict=True)]
        values = [torch.linalg.svdvals(dense(p)).square().tolist() for p in pairs]
        ranked = sorted(((weights[i] * v, i, v) for i in range(n) for v in values[i]), reverse=True)
        apart[k], budget = list(whole[k]), rank + rank * n / (OUT + WIDTH)
        for _, i, value in ranked[: math.ceil(budget)]:
            apart[k][i] -= min(budget, 1.0) * value
            budget -= 1
    for errors, expected in ((found.errors, lost), (found.separate, apart)):
        for k in layers:
            parts = [
                sum(w * x for w, x in zip(weights, s[k], strict=True)) for s in (expected, whole)
            ]
            assert errors.layers[k] == pytest.approx((parts[0] / parts[1]) ** 0.5, rel=1e-6)
        shares = [weights[i] * sum(expected[k][i] for k in layers) for i in range(n)]
        assert [*errors.adapters] == ["u", "v", "w"]
        assert [*errors.adapters.values()] == pytest.approx([s**0.5 for s in shares], rel=1e-6)
        assert errors.total == pytest.approx((sum(shares) / n) ** 0.5, rel=1e-6)
        assert errors.over(layers) == errors.total


def test_the_scale_of_an_adapter_is_no_weight(tmp_path):
    changes = common(3, 4, 3)
    errors = []
    for factor, folder in ((1.0, tmp_path / "one"), (1000.0, tmp_path / "large")):
        folder.mkdir()
        (B, A), *others = changes
        found = solver.compress_many(written(folder, [(factor * B, A), *others]), 8)
        errors.append([*found.errors.adapters.values()])
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_more_ranks_and_more_rounds_are_nearer(tmp_path):
    changes = common(4, 4, 4)
    paths = written(tmp_path, changes)
    by_rank = [solver.compress_many(paths, r).errors.total for r in (1, 3, 6, 12, 18, 20)]
    assert by_rank == sorted(by_rank, reverse=True)
    assert by_rank[-1] < 0.05 < by_rank[3]
    rounds = (0, 1, 5, 20, 21, 60)
    by_rounds = [solver.compress_many(paths, 8, iterations=i, tol=0.0).errors.total for i in rounds]
    assert by_rounds == sorted(by_rounds, reverse=True)
    assert by_rounds[-1] < 0.9 * by_rounds[0]


@pytest.mark.parametrize("extra", [8, 4])
def test_no_farther_than_as_many_singular_components(extra, tmp_path):
    changes = [dense(p) for p in common(4, 8 - extra, extra)]
    paths = written(tmp_path, common(4, 8 - extra, extra))
    values = torch.cat([torch.linalg.svdvals(m).square() / m.square().sum() for m in changes])
    for rank in (3, 10, 20):
        least = (values.sort(descending=True).values[rank:].sum().item() / 4) ** 0.5
        found = solver.compress_many(paths, rank)
        assert found.errors.total <= least + 1e-6
        assert found.separate.total <= least + 1e-6  # it has n R / (in + out) more components


def test_every_block_is_a_least_squares_solution(tmp_path):
    """At convergence, dense least squares over only B, A or d does not lower the error."""
    changes = [dense(p) / dense(p).norm() for p in common(3, 4, 2)]
    paths = written(tmp_path, common(3, 4, 2))
    found = solver.compress_many(paths, 6, iterations=1500, tol=1e-12)
    B, A, d = (tensor.double() for tensor in found.loras.layers["x"])
    d = d / torch.stack([dense(p).norm() for p in common(3, 4, 2)])[:, None]

    def error(B, A, d):
        near = [(B * row) @ A for row in d]
        return sum((m - n).square().sum().item() for m, n in zip(changes, near, strict=True))

    rows = torch.cat([row[:, None] * A for row in d], 1)  # for M_1, M_2, ... side by side
    best_B = torch.linalg.lstsq(rows.T, torch.cat(changes, 1).T).solution.T
    best_A = torch.linalg.lstsq(torch.cat([B * row for row in d]), torch.cat(changes)).solution
    ranks = torch.einsum("or,ri->oir", B, A).reshape(-1, B.shape[1])
    targets = torch.stack([m.reshape(-1) for m in changes], 1)
    best_d = torch.linalg.lstsq(ranks, targets).solution.T
    now = error(B, A, d)
    assert now > 0.01
    for better in ((best_B, A, d), (B, best_A, d), (B, A, best_d)):
        assert error(*better) == pytest.approx(now, rel=1e-4)


def test_no_out_x_in_matrix_is_formed(tmp_path):
    changes = [(random(900, 4, seed=i), random(4, 700, seed=-i - 1)) for i in range(3)]
    paths = written(tmp_path, changes)
    with LargestTensor() as seen:
        found = solver.compress_many(paths, 6)
        found.loras.save(tmp_path / "set")
        found.loras.expand("l0", tmp_path / "out")
    assert 0 < seen.numel <= 900 * 700 / 40


def test_ranks_scales_and_layers_may_differ(tmp_path):
    """Adapters may have one or both of two layers, different ranks and every kind of scale."""
    x, y, z, w = own(4, 5)
    paths = [
        write(tmp_path / "plain", {"a.x": x, "b.x": (y[0][:, :2], y[1][:2])}, lora_alpha=10),
        write(tmp_path / "stable", {"a.x": z}, use_rslora=True, lora_alpha=3),
        write(tmp_path / "other", {"b.x": w}, alpha_pattern={"b.x": 20}, lora_alpha=1),
    ]
    expected = {
        "plain": {"a.x": 2 * dense(x), "b.x": 5 * dense((y[0][:, :2], y[1][:2]))},
        "stable": {"a.x": 3 / 5**0.5 * dense(z), "b.x": torch.zeros(OUT, WIDTH).double()},
        "other": {"a.x": torch.zeros(OUT, WIDTH).double(), "b.x": 4 * dense(w)},
    }
    found = solver.compress_many(paths, 10)  # enough for all components
    assert found.given == 5 * (OUT + WIDTH) * 3 + 2 * (OUT + WIDTH)
    assert found.loras.num_parameters == 2 * 10 * (OUT + WIDTH + 3)
    assert not found.loras.layers["b.x"].d[1].any()
    for name, layers in expected.items():
        found.loras.expand(name, tmp_path / f"{name}-10")
        tensors = load_file(tmp_path / f"{name}-10" / WEIGHTS)
        config = json.loads((tmp_path / f"{name}-10" / CONFIG).read_text())
        assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (10, 10, False)
        for layer, change in layers.items():
            A, B = (tensors[f"base_model.model.{layer}.lora_{p}.weight"] for p in "AB")
            assert (tuple(A.shape), tuple(B.shape)) == ((10, WIDTH), (OUT, 10))
            torch.testing.assert_close(dense((B, A)), change, rtol=0, atol=1e-3)


def test_more_rank_than_there_is_and_adapters_that_change_nothing(tmp_path):
    x, y = own(2, 3)
    paths = written(tmp_path, [x, (torch.zeros(OUT, 3), y[1]), y])
    found = solver.compress_many(paths, 11)
    assert found.errors.total < 1e-6
    assert found.errors.adapters["l1"] == found.separate.adapters["l1"] == 0.0
    assert not found.loras.layers["x"].d[1].any()
    assert found.loras.rank == 11
    none = [(torch.zeros(OUT, 3), y[1])] * 2
    (tmp_path / "none").mkdir()
    found = solver.compress_many(written(tmp_path / "none", none), 2)
    assert (found.errors.total, found.separate.total) == (0.0, 0.0)
    assert not any(t.any() for t in found.loras.layers["x"])


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)])
def test_the_file(dtypes, tmp_path):
    """The file has the widest dtype of the LoRAs, and the errors include the rounding to it."""
    pairs = [[t.to(dtype) for t in p] for p, dtype in zip(common(2, 5), dtypes, strict=True)]
    found = solver.compress_many(dict(zip("uv", written(tmp_path, pairs), strict=True)), 5)
    B, A, d = (tensor.double() for tensor in found.loras.layers["x"])
    for i, (pair, error) in enumerate(zip(pairs, found.errors.adapters.values(), strict=True)):
        exact = (dense(pair) - (B * d[i]) @ A).norm() / dense(pair).norm()
        assert error == pytest.approx(exact.item(), rel=1e-5)
        assert 1e-5 < error < 1e-2
    found.loras.save(tmp_path / "set")
    tensors = load_file(tmp_path / "set" / WEIGHTS)
    assert {t.dtype for t in tensors.values()} == {dtypes[1]}
    assert sum(t.numel() for t in tensors.values()) == found.loras.num_parameters
    again = solver.LoraSet.load(tmp_path / "set")
    assert (again.names, again.lora) == (("u", "v"), found.loras.lora)
    for one, other in zip(found.loras.layers["x"], again.layers["x"], strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def llamas(tmp_path):
    """Two LoRAs of a model: one over all linear layers, one over some of them."""
    paths = []
    for name, targets in (
        ("all", "all-linear"),
        ("some", ["q_proj", "v_proj", "layers.1.mlp.down_proj"]),
    ):
        model = rasa_ext.patch_model(LLAMA.build(), rank=4, k=1, target_modules=targets)
        with torch.no_grad():
            for i, parameter in enumerate(rasa_ext.adapter_parameters(model)):
                parameter.add_(0.3 * random(*parameter.shape, seed=i))
        paths.append(tmp_path / name)
        rasa_ext.export_lora(model, paths[-1])
    return paths


@pytest.mark.filterwarnings("ignore:.*SGLang")
def test_in_a_model(llamas, tmp_path):
    """An expanded LoRA in PEFT and diagonals in rasa_ext both compute the set's changes."""
    peft = pytest.importorskip("peft")
    loras = solver.compress_many(llamas, 6, iterations=5).loras
    model = loras.install(LLAMA.build(), "some")
    for name in ("some", "all"):
        training.load_diagonals(model, loras.diagonals(name))
        loras.expand(name, tmp_path / f"{name}-6")
        theirs = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path / f"{name}-6").eval()
        with torch.no_grad():
            ours, expected = (LLAMA.loss(m, LLAMA.inputs(0))[0] for m in (model.eval(), theirs))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        for layer, adapter in adapters(model).items():
            near = loras.layers[layer].delta(loras.index(name)).double()
            torch.testing.assert_close(oracle.delta(adapter), near, rtol=1e-5, atol=1e-6)
    assert set(adapters(model)) == set(loras.layers)


@pytest.mark.filterwarnings("ignore:.*SGLang")
def test_a_set_that_does_not_fit(llamas):
    loras = solver.compress_many(llamas, 2, iterations=0).loras
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    refused(lambda: loras.install(model, "all"), model, "expected names of linear layers")
    model = LLAMA.build()
    refused(lambda: loras.install(model, "none"), model, "name: expected one of all, some, got")
    loras.install(model, "all")
    refused(lambda: loras.install(model, "all"), model, "unpatch")


def test_what_peft_is_told(tmp_path):
    pairs = own(2, 2)

    def told(**second):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        first = {"target_modules": ["x", "y"], "base_model_name_or_path": "base"}
        paths = [
            write(folder / "u", {"a.x": pairs[0]}, task_type="CAUSAL_LM", **first),
            write(folder / "v", {"a.x": pairs[1]}, task_type="CAUSAL_LM", **{**first, **second}),
        ]
        return solver.compress_many(paths, 2, iterations=0).loras.lora

    assert told(target_modules=["y", "x"]) == {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "target_modules": ["x", "y"],
        "fan_in_fan_out": False,
    }
    for second in ({"target_modules": "x|y"}, {"layers_to_transform": [0]}):
        assert told(**second)["target_modules"] == ["a.x"]
    assert told(fan_in_fan_out=True)["fan_in_fan_out"]
    with pytest.warns(UserWarning, match=r"differently \(u: base; v: other\)"):
        told(base_model_name_or_path="other")


@pytest.mark.parametrize(
    ("factors", "config", "message"),
    [
        ({"x": own(1, 2)[0]}, {"peft_type": "VERA"}, "expected peft_type 'LORA'"),
        ({"x": own(1, 2)[0]}, {"use_dora": True}, "expected a plain LoRA"),
        ({"x": (random(OUT + 1, 2), random(2, WIDTH))}, {}, r"'x' is \(25, 20\) .* and \(24, 20\)"),
        ({"x": (random(OUT, 2) * torch.nan, random(2, WIDTH))}, {}, "expected finite numbers"),
    ],
)
def test_loras_that_are_refused_are_named(factors, config, message, tmp_path):
    paths = [
        write(tmp_path / "good", {"x": own(1, 2)[0]}),
        write(tmp_path / "bad", factors, **config),
    ]
    with pytest.raises(ValueError, match=rf"(?s)^{tmp_path}/bad: .*{message}"):
        solver.compress_many(paths, 2)


@pytest.mark.parametrize(
    ("key", "trained"),
    [
        ("norm.weight", "modules_to_save has trained norm.weight"),
        ("embed.token_adapter.trainable_tokens_delta", "trainable_token_indices has trained embed"),
    ],
)
def test_what_was_trained_beside_a_lora_is_refused(key, trained, tmp_path):
    paths = written(tmp_path, own(2, 2))
    tensors = load_file(paths[1] / WEIGHTS)
    save_file(tensors | {f"base_model.model.{key}": torch.ones(3)}, paths[1] / WEIGHTS)
    with pytest.raises(ValueError, match=rf"^{paths[1]}: .*{trained}"):
        solver.compress_many(paths, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank: expected 1 or more, got 0"),
        ({"rank": True}, TypeError, "rank: expected an integer, got True"),
        ({"rank": 2, "iterations": 1.5}, TypeError, "iterations: expected an integer, got 1.5"),
        ({"rank": 2, "tol": -1}, ValueError, "tol: expected a number, 0 or more, got -1"),
        ({"directories": "lora"}, TypeError, "directories: expected a sequence .* got str"),
        ({"directories": ["a"]}, ValueError, "expected two LoRAs or more, got 1"),
        ({"directories": ["a", "b/../a"]}, ValueError, "a and b/../a are both named 'a'"),
        ({"directories": {"x/y": "a", "z": "b"}}, ValueError, "folder name for a, got 'x/y'"),
        ({"directories": ["none", "nowhere"]}, FileNotFoundError, "none"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        solver.compress_many(**{"directories": ["a", "b"], "rank": 2, **options})


def test_sets_that_are_refused(tmp_path):
    paths = written(tmp_path, own(2, 2))
    solver.compress_many(paths, 3).loras.save(tmp_path / "set")
    with pytest.raises(ValueError, match=r"peft_type 'LORA_SET' .* got 'LORA'"):
        solver.LoraSet.load(paths[0])
    tensors = load_file(tmp_path / "set" / WEIGHTS)
    A, B, d = (f"base_model.model.x.lora_set_{field}" for field in "ABd")
    for spoil, message in (
        ({k: t for k, t in tensors.items() if k != B}, f"1 missing: {B}"),
        (
            tensors | {d: tensors[d][:1]},
            r"of another shape: .*_d \(expected \(2, 3\), got \(1, 3\)",
        ),
        (tensors | {A: tensors[A][:2]}, r"_A \(expected \(3, 20\), got \(2, 20\)"),
        (tensors | {A: tensors[A] * torch.nan}, "expected finite numbers"),
    ):
        save_file(spoil, tmp_path / "set" / WEIGHTS)
        with pytest.raises(ValueError, match=message):
            solver.LoraSet.load(tmp_path / "set")


@pytest.mark.parametrize(
    "fields",
    [{"adapters": None}, {"adapters": "uv"}, {"adapters": [1, 2]}, {"r": "3"}, {"lora": None}],
    ids=str,
)
def test_sets_of_wrong_fields(fields, tmp_path):
    solver.compress_many(written(tmp_path, own(2, 2)), 3).loras.save(tmp_path / "set")
    path = tmp_path / "set" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(ValueError, match=r"set: expected tensors, and in adapter_config.json a"):
        solver.LoraSet.load(tmp_path / "set")
