"""finetune from an existing adapter, and further options of a new adapter."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

import rasa_ext
from rasa_ext.commands.models import load_model, load_tokenizer
from tests.helpers import oracle
from tests.helpers.adapters import content, patched
from tests.helpers.cli import invoke, load, logits, save_lora
from tests.helpers.finetuning import Given, assert_same_runs, interrupted, losses, run
from tests.helpers.tiny_lm import CHATML, make_tokenizer, save_base, sums, write_jsonl

STILL = 1e-30  # a learning rate that changes nothing


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base, data, and adapters to start from: this package's and a LoRA of PEFT."""
    folder = tmp_path_factory.mktemp("start")
    base = save_base(folder / "base", hidden_size=64, intermediate_size=128)
    write_jsonl(folder / "train.jsonl", sums(16))
    config = rasa_ext.RasaConfig(
        rank=6, k=2, dropout=0.1, target_modules=["q_proj", "up_proj"], modules_to_save=["norm"]
    )
    rasa_ext.save_adapter(patched(load(base), config=config), folder / "rasa")
    lora = rasa_ext.methods.LoraConfig(rank=3, alpha=6.0, rslora=True)
    rasa_ext.save_adapter(patched(load(base), config=lora), folder / "lora")
    save_lora(base, folder / "peft")
    return folder


@pytest.fixture
def options(folder, tmp_path) -> Given:
    return {
        "model": str(folder / "base"),
        "data": str(folder / "train.jsonl"),
        "output": str(tmp_path / "out"),
        "lr": 1e-2,
        "max_steps": 4,
        "batch_size": 4,
        "dtype": "float32",
    }


@pytest.mark.parametrize(
    ("name", "k", "said"),
    [
        ("rasa", None, "RaSA, rank 6, k 2"),
        ("lora", None, "LoRA, rank 3"),
        ("peft", None, "RaSA, rank 6, k 0"),
        ("peft", 2, "RaSA, rank 6, k 2"),
    ],
)
def test_an_adapter_is_trained_on_from_what_it_computes(name, k, said, folder, options):
    before, start = load(folder / "base"), folder / name
    read = PeftModel.from_pretrained if name == "peft" else rasa_ext.load_adapter
    expected = logits(read(before, start).eval())
    dense = read(load(folder / "base"), start).eval()
    dense = dense.merge_and_unload() if name == "peft" else rasa_ext.merge_and_unload(dense)
    error = oracle.rounding(dense, logits)
    text = run(options, init_adapter=str(start), k=k, lr=STILL, max_steps=1)[1]
    assert f"Starting from {start}: {said}." in text
    model = rasa_ext.load_adapter(load(folder / "base"), options["output"]).eval()
    oracle.assert_close(logits(model), expected, error)
    _, again = run(options, init_adapter=str(start), k=k, overwrite=True)
    assert losses(options["output"])[-1][1] < losses(options["output"])[0][1]
    assert said in again
    model = rasa_ext.load_adapter(load(folder / "base"), options["output"]).eval()
    assert (logits(model) - expected).abs().max() > 0.01


def test_an_adapter_is_trained_on_with_its_own_chat_template(folder, options, tmp_path):
    start, template = tmp_path / "start", CHATML.replace("im_start", "turn")
    shutil.copytree(folder / "rasa", start)
    make_tokenizer(template).save_pretrained(start)
    text = run(options, init_adapter=str(start), max_steps=1)[1]
    assert "<|turn|>user" in text
    assert load_tokenizer(options["output"]).chat_template == template


def test_a_run_that_trains_on_is_resumed_to_the_bit(folder, options, tmp_path):
    start = {"init_adapter": str(folder / "rasa")}
    run(options, **start, output=str(tmp_path / "whole"))
    interrupted(2, options, **start)
    record = yaml.safe_load((Path(options["output"]) / "options.yaml").read_text())
    assert record["init_adapter"] == start["init_adapter"]
    assert not {"rank", "method", "target_modules"} & record.keys()
    with pytest.raises(ValueError, match=r"resume: .* init_adapter \('\S+rasa' before, '\S+lora' "):
        run(options, init_adapter=str(folder / "lora"), resume=True)
    with pytest.raises(ValueError, match=r"resume: .* init_adapter \('\S+rasa' before, None now\)"):
        run(options, resume=True)
    invoke("finetune", "--config", Path(options["output"]) / "options.yaml", "--resume")
    assert_same_runs(options["output"], tmp_path / "whole")
    card = (Path(options["output"]) / "README.md").read_text()
    assert "| init_adapter | `rasa` |" in card
    assert str(folder) not in card
    assert "| target_modules |" not in card  # only a new adapter has this option


OWN = [
    ({"rank": 4}, "rank: expected none, as init_adapter has its own, got"),
    ({"k": 1}, "k: expected none, as init_adapter has its own, got 1"),
    ({"method": "lora"}, "method: expected none, as init_adapter has its own, got 'lora'"),
    ({"modules_to_save": "norm"}, "modules_to_save: expected none, as init_adapter"),
    ({"init_adapter": "base"}, "init_adapter: expected an adapter's directory, but .*base hol"),
]


@pytest.mark.parametrize(("change", "message"), OWN)
def test_options_that_an_adapter_has_of_its_own(change, message, folder, options, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(options, **{"init_adapter": "rasa", **change})
    assert not Path(options["output"]).exists()


def test_an_adapter_of_another_model_is_refused(folder, options, tmp_path):
    other = save_base(tmp_path / "other")
    for name in ("rasa", "peft"):
        with pytest.raises(ValueError, match=f"{name}: .*(not fit the model|expected .out, in)"):
            run(options, model=str(other), init_adapter=str(folder / name))


def test_an_adapter_in_place_of_a_model_names_the_option_for_it(folder):
    message = f"pass the adapter's base .* pass the base and `--init-adapter {folder / 'rasa'}` to"
    with pytest.raises(ValueError, match=message):
        run({"model": str(folder / "rasa"), "data": "d"})


def test_modules_are_left_out_or_trained_in_full(options):
    text = run(options, exclude_modules="mlp.up_proj, o_proj", modules_to_save="norm, lm_head")[1]
    stored = load_file(Path(options["output"]) / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in stored if ".rasa_" in name} == {
        *("q_proj", "k_proj", "v_proj", "gate_proj", "down_proj")
    }
    base = load(Path(options["model"]))
    for name in ("model.norm.weight", "lm_head.weight"):
        change = stored[f"base_model.model.{name}"] - base.get_parameter(name)
        assert change.abs().max() > 1e-3
    total = sum(tensor.numel() for tensor in stored.values())
    assert f"{total:,} of " in text
    run(options, exclude_modules=r"regex:.*layers\.0\..*", overwrite=True, max_steps=1)
    stored = load_file(Path(options["output"]) / "adapter_model.safetensors")
    assert not [name for name in stored if "layers.0." in name]


@pytest.mark.parametrize("nested", [True, False])
def test_ranks_of_single_layers_come_from_a_file(nested, options, tmp_path):
    ranks, file = {"0.self_attn.q_proj": 5, "up_proj": 3}, tmp_path / "ranks.json"
    file.write_text(json.dumps({"k": 1, "rank_pattern": ranks} if nested else ranks))
    run(options, rank=4, k=1, rank_pattern=str(file), max_steps=1)
    stored = load_file(Path(options["output"]) / "adapter_model.safetensors")
    private = {name.split("layers.")[1]: len(A) for name, A in stored.items() if "rasa_A" in name}
    assert private["0.self_attn.q_proj.rasa_A"] == 4
    assert private["1.self_attn.q_proj.rasa_A"] == 3
    assert private["1.mlp.up_proj.rasa_A"] == 2


@pytest.mark.parametrize("kind", ["load_in_4bit", "load_in_8bit"])
def test_a_base_in_fewer_bits(kind, options, folder, tmp_path, monkeypatch):
    if kind == "load_in_4bit":
        with monkeypatch.context() as patch:
            patch.setattr("importlib.util.find_spec", lambda _: None)
            with pytest.raises(ValueError, match="load_in_4bit: needs bitsandbytes: pip install"):
                run(options, **{kind: True})
    run(options, **{kind: True})
    stored = load_file(Path(options["output"]) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    quantized = losses(options["output"])
    assert quantized[-1][1] < quantized[0][1]
    run(options, output=str(tmp_path / "whole"))
    assert quantized[0][1] != losses(tmp_path / "whole")[0][1]
    assert quantized[0][1] == pytest.approx(losses(tmp_path / "whole")[0][1], rel=0.05)
    invoke("merge", options["output"], "--output", tmp_path / "merged")
    with pytest.raises(ValueError, match=re.escape(f"resume: the run of {options['output']}")):
        run(options, resume=True)


def test_a_gguf_is_not_quantized_again(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="load_in_4bit: expected a hub id or a model"):
        load_model(str(tmp_path / "m.gguf"), quantization="load_in_4bit")


@pytest.mark.parametrize("name", ["base", "rasa"])
def test_what_a_run_begins_with_is_not_overwritten(name, options, folder):
    given = {"init_adapter": str(folder / "rasa"), "output": str(folder / name)}
    before = content(folder / name)
    with pytest.raises(ValueError, match="output: expected another directory than the inputs'"):
        run(options, **given, overwrite=True)
    assert content(folder / name) == before
