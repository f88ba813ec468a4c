"""The plug-in in a process without vLLM, and over stand-ins for its modules."""

import copy
import dataclasses
import functools
import logging
import os
import subprocess
import sys
import tomllib
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

import rasa_ext
from rasa_ext.checkpoint import read_lora
from rasa_ext.serving import expansion, register
from rasa_ext.serving.vllm import POOLS, TESTED
from tests.helpers.adapters import patched
from tests.helpers.tiny_lm import make_model

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass
class Request:
    lora_name: str
    lora_path: str


class Manager:
    """As vLLM's ``WorkerLoRAManager``, which reads a folder in PEFT's format."""

    def __init__(self, rank=8):
        self.lora_config = types.SimpleNamespace(max_lora_rank=rank, lora_dtype=torch.bfloat16)
        self._adapter_manager = types.SimpleNamespace(model=make_model())

    def _load_adapter(self, lora_request):
        return types.SimpleNamespace(lora=read_lora(lora_request.lora_path), of=lora_request)


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for vLLM's modules, whose class the test may change before ``register``."""
    kind = type("Manager", (), dict(vars(Manager)))
    parts = {"vllm": {}, "vllm.lora": {}}
    parts["vllm.lora.worker_manager"] = {"WorkerLoRAManager": kind}
    parts["vllm.lora.utils"] = {"get_adapter_absolute_path": lambda path: path}
    for name, content in parts.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv(POOLS, raising=False)
    return kind


@pytest.fixture
def folder(tmp_path):
    rasa_ext.save_adapter(patched(make_model(), 4, 1), tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_vllm_reads_the_expanded_lora_in_its_own_dtype(vllm, folder):
    register()
    request = Request("mine", folder)
    told = vllm()._load_adapter(request)
    assert request.lora_path == folder
    assert not Path(told.of.lora_path).exists()
    assert told.lora.rank == told.lora.config["r"] == 3 + make_model().config.num_hidden_layers
    assert {A.dtype for _, A in told.lora.factors.values()} == {torch.bfloat16}
    assert told.rasa_pools == {}


def test_other_folders_go_to_vllm(vllm, tmp_path):
    rasa_ext.export_lora(patched(make_model(), 4, 1), tmp_path)
    register()
    assert vllm()._load_adapter(Request("mine", str(tmp_path))).of.lora_path == str(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json"):
        vllm()._load_adapter(Request("mine", str(tmp_path / "absent")))


def test_the_error_names_the_rank_to_pass(vllm, folder):
    register()
    with pytest.raises(ValueError, match=r"at least 5 .*'mine'.*got 1; .*--max-lora-rank 8\."):
        vllm(1)._load_adapter(Request("mine", folder))


def test_the_rank_is_compared_before_anything_is_computed(vllm, folder, monkeypatch):
    register()
    monkeypatch.setattr(expansion.ops, "differentiable_pack", None)
    with pytest.raises(ValueError, match="--max-lora-rank"):
        vllm(1)._load_adapter(Request("mine", folder))


def packed_names(name):
    return name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"), True


def over(vllm, monkeypatch, **sizes):
    """Return a manager whose modules are vLLM's over a model of these sizes."""
    monkeypatch.setattr(
        sys.modules["vllm.lora.utils"],
        "parse_fine_tuned_lora_name",
        lambda name, mapper: packed_names(name),
        raising=False,
    )
    manager, model = vllm(64), make_model(**sizes)
    manager._adapter_manager = types.SimpleNamespace(
        model=model,
        packed_modules_mapping={"qkv_proj": ["q_proj", "k_proj", "v_proj"]},
        modules={
            name.replace("q_proj", "qkv_proj"): types.SimpleNamespace(
                base_layer=types.SimpleNamespace(input_size=module.in_features)
            )
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and not name.endswith(("k_proj", "v_proj"))
        },
    )
    return manager


def test_an_adapter_of_another_base_is_refused_by_the_first_difference(vllm, tmp_path, monkeypatch):
    register()
    mine = make_model().config
    others = {
        "narrow": {"hidden_size": 2 * mine.hidden_size},
        "deep": {"num_hidden_layers": mine.num_hidden_layers - 1},
        "shallow": {"num_hidden_layers": mine.num_hidden_layers + 1},
    }
    rasa_ext.save_adapter(patched(make_model(), 4, 1), tmp_path)
    over(vllm, monkeypatch)._load_adapter(Request("mine", str(tmp_path)))
    for name, sizes in others.items():
        said = "inputs in the adapter, here" if name == "narrow" else r"\d layers .* here \d"
        with pytest.raises(ValueError, match=rf"'{name}': .* adapter of this base.*{said}"):
            over(vllm, monkeypatch, **sizes)._load_adapter(Request(name, str(tmp_path)))
    rasa_ext.save_adapter(patched(make_model(), 4, 1, target_modules="model.layers.0.*"), tmp_path)
    over(vllm, monkeypatch)._load_adapter(Request("first layer", str(tmp_path)))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pipe_is_refused_not_waited_for(name, vllm, folder):
    register()
    Path(folder, name).unlink()
    os.mkfifo(Path(folder, name))
    with pytest.raises(ValueError, match=f"{name}: expected a file"):
        vllm()._load_adapter(Request("mine", folder))


def test_a_rank_that_vllm_has_not(vllm, tmp_path):
    rasa_ext.save_adapter(patched(make_model(), 520, 0), tmp_path)
    register()
    with pytest.raises(ValueError, match=r"at least 520 .*got 512; merge it"):
        vllm(512)._load_adapter(Request("mine", str(tmp_path)))


def test_it_wraps_once(vllm):
    register()
    once = vllm._load_adapter
    register()
    assert vllm._load_adapter is once


def test_another_plug_in_may_have_wrapped_it_before(vllm, folder):
    before = vllm._load_adapter
    vllm._load_adapter = functools.wraps(before)(lambda *given: before(*given))
    test_vllm_reads_the_expanded_lora_in_its_own_dtype(vllm, folder)


@pytest.mark.parametrize("change", ["no method", "another signature"])
def test_a_vllm_without_the_seam_is_left_alone(vllm, change, caplog):
    if change == "no method":
        del vllm._load_adapter
    else:
        vllm._load_adapter = lambda self, request, device: None
    before = copy.copy(dict(vars(vllm)))
    with caplog.at_level(logging.WARNING):
        register()
    assert dict(vars(vllm)) == before
    (record,) = caplog.records
    assert "_load_adapter" in record.getMessage()
    assert ", ".join(TESTED) in record.getMessage()


@pytest.mark.parametrize("text", ["yes", "shared:", "shared:0", "shared:x", "Shared"])
def test_other_words_for_pools(vllm, text, monkeypatch):
    monkeypatch.setenv(POOLS, text)
    with pytest.raises(ValueError, match=f'{POOLS}: expected nothing, "shared".*got {text!r}'):
        register()


def test_the_entry_point_imports_neither_torch_nor_vllm():
    text = (ROOT / "pyproject.toml").read_text()
    (announced,) = tomllib.loads(text)["project"]["entry-points"]["vllm.general_plugins"].items()
    assert EntryPoint(*announced, "vllm.general_plugins").load() is register
    code = "import sys; from rasa_ext.serving import register; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert not {"torch", "vllm", "transformers"} & set(done.stdout.split()), done.stderr
