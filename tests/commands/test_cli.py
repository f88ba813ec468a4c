"""The command: printed text, written files, and reading the files with other libraries."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

import rasa_ext
from rasa_ext.commands import main, models
from rasa_ext.commands.app import app
from tests.helpers import oracle
from tests.helpers.adapter_folders import edit
from tests.helpers.adapters import patched
from tests.helpers.cli import invoke, load, logits, save_lora, save_official
from tests.helpers.tiny_lm import make_model, save_base, sums, write_jsonl


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory) -> Path:
    """A random adapter, far from its initial values, with the base's name in its config."""
    directory = tmp_path_factory.mktemp("cli") / "adapter"
    rasa_ext.save_adapter(patched(load(base)), directory)
    return directory


@pytest.fixture(scope="module")
def expected(base, tuned) -> torch.Tensor:
    model = rasa_ext.load_adapter(load(base), tuned)
    result = logits(model)
    assert (result - logits(load(base))).abs().max() > 0.1
    return result


def test_merge_writes_a_standalone_model(base, tuned, expected, tmp_path):
    text = invoke("merge", tuned, "--output", tmp_path / "merged")
    assert f"Merging {tuned} ..." in text
    assert re.search(r"the largest change of a weight is \d", text)
    merged = load(tmp_path / "merged")
    assert not any(isinstance(m, rasa_ext.RasaLinear) for m in merged.modules())
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    both = [AutoTokenizer.from_pretrained(path) for path in (tmp_path / "merged", base)]
    assert both[0]("what is").input_ids == both[1]("what is").input_ids


@pytest.mark.parametrize(("word", "said"), [("train", "sft"), ("chat", "generate")])
def test_a_command_of_another_name_is_pointed_to(word, said):
    assert f"No such command '{word}': use {said}." in invoke(word, code=2)


def test_values_without_commas_are_told_apart_from_arguments():
    words = ("inspect", "a", "--target-modules", "q_proj", "v_proj")
    assert "unexpected 'v_proj'; separate the values of an option by commas" in invoke(
        *words, code=2
    )


def test_an_ascii_console_ends_no_run():
    code = """if True:
        import sys
        from rasa_ext.commands import main
        sys.argv = ["rasa-ext", "--version"]
        try:
            main()
        except SystemExit:
            print("O\\u00f9")
    """
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | plain, capture_output=True)
    assert done.stdout.split() == [rasa_ext.__version__.encode(), b"O?"], done.stderr


def test_merge_in_another_dtype(base, tuned, tmp_path):
    invoke("merge", tuned, "--model", base, "--output", tmp_path / "m", "--dtype", "bfloat16")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_export_lora_of_a_bfloat16_base_leaves_the_dtype_to_vllm(tuned, tmp_path):
    make_model().bfloat16().save_pretrained(tmp_path / "half")
    text = invoke("export-lora", tuned, "--model", tmp_path / "half", "--output", tmp_path / "lora")
    assert f"vllm serve {tmp_path / 'half'} --enable-lora" in text


def test_export_lora_as_gguf_prints_the_server_alone(base, tuned, tmp_path, monkeypatch):
    out = tmp_path / "lora"
    words = ["export-lora", tuned, "--output", out, "--format", "gguf"]
    text = invoke(*words)
    assert f"convert_hf_to_gguf.py {base} --outfile {out}/base.gguf --outtype f32" in text
    assert f"llama-server -m {out}/base.gguf --lora {out}/adapter.gguf --cache-ram 0" in text
    names = sorted(path.name for path in out.iterdir())
    assert names == ["Modelfile", "README.md", "adapter.gguf"]
    assert (out / "Modelfile").read_text() == "FROM ./base.gguf\nADAPTER ./adapter.gguf\n"

    monkeypatch.setattr(models, "load_model", lambda name, score: make_model())
    gguf = tmp_path / "m.Q4_1.gguf"
    text = invoke(*words, "--model", gguf, "--overwrite")
    assert "convert" not in text
    assert f"llama-server -m {gguf} --lora {out}/adapter.gguf --cache-ram 0" in text


def test_export_lora_for_mlx_tells_of_a_base_that_mlx_misreads(base, tuned, tmp_path):
    out = tmp_path / "lora"
    text = invoke("export-lora", tuned, "--output", out, "--format", "mlx")
    assert f"mlx_lm.server --model {base} --adapter-path {out}" in text
    assert "has only rope_parameters" in text


def test_export_lora_at_a_given_rank(base, tuned, tmp_path):
    words = ["export-lora", tuned, "--output", tmp_path / "lora", "--overwrite", "--rank"]
    assert "vLLM serves ranks up to 512" in invoke(*words, 600)
    assert "--max-lora-rank 16" in invoke(*words, 16)
    text = invoke(*words, 2)
    assert "LoRA of rank 2 in" in text
    assert "--max-lora-rank 8" in text
    found = rasa_ext.export_error(rasa_ext.load_adapter(load(base), tuned), 2)
    assert found.error > 0.1
    for name, error in {**found.layers, "all": found.error}.items():
        assert f" {name} {error:.3g} " in text


def test_export_lora_refuses_what_a_reader_would_drop(base, tmp_path):
    model = rasa_ext.patch_model(load(base), rank=4, k=1, modules_to_save=["norm"])
    rasa_ext.save_adapter(model, tmp_path / "adapter")
    words = ["export-lora", tmp_path / "adapter", "--output", tmp_path / "lora"]
    text = invoke(*words, code=1)
    assert "Error: model: " in text
    assert "--allow-dropped" in text
    assert not (tmp_path / "lora").exists()
    with pytest.warns(UserWarning, match="llama.cpp reads the trained norms"):
        assert "LoRA of rank 5" in invoke(*words, "--allow-dropped")


def test_import_official(base, tuned, expected, tmp_path):
    official = save_official(rasa_ext.load_adapter(load(base), tuned), tmp_path / "official")
    edit(official, base_model_name_or_path=str(base))
    invoke("import-official", official, "--output", tmp_path / "ours")
    ours = rasa_ext.load_adapter(load(base), tmp_path / "ours")
    torch.testing.assert_close(logits(ours.eval()), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("k", "options"), [(0, ()), (2, ("--k", 2))])
def test_import_lora(k, options, base, tmp_path):
    lora = save_lora(base, tmp_path / "lora")
    text = invoke("import-lora", lora, "--output", tmp_path / "ours", *options)
    assert f"of k = {k} and rank 6, for 4 layers in {tmp_path / 'ours'}" in text
    told = "Computes the same function as the LoRA `lora` of rank 6."
    assert told in (tmp_path / "ours" / "README.md").read_text()
    model = rasa_ext.load_adapter(load(base), tmp_path / "ours").eval()
    theirs = PeftModel.from_pretrained(load(base), lora).eval()
    oracle.assert_close(logits(model), logits(theirs), oracle.rounding(theirs, logits))


def test_inspect_a_model_shows_what_would_be_trained(base):
    text = invoke("inspect", base, "--rank", 4, "--k", 2)
    model = make_model()
    rasa_ext.patch_model(model, rank=4, k=2)
    report = rasa_ext.summary(model)
    for row in report:
        assert f"{row.pattern} {row.L} {row.shape[0]} x {row.shape[1]} {row.R}" in text
    assert f"trainable: {report.trainable:,} of {report.total:,}" in text
    assert "left out: lm_head" in text


def test_env_says_which_kernels_are_in_use_and_why():
    text = invoke("env")
    assert f"torch {version('torch')}" in text
    assert rasa_ext.cuda_status() in text


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(base, tmp_path):
    values = {
        "rank": 4,
        "alpha": 16,
        "batch-size": 2,  # either spelling
        "seq_len": 64,
        "lr": "1e-3",  # YAML also reads a bare 1e-3 as a string
        "max_steps": 3,
        "gradient_checkpointing": True,
        "target_modules": ["q_proj", "v_proj"],
        "k": None,
    }
    data, output = write_jsonl(tmp_path / "train.jsonl", sums(4)), tmp_path / "out"
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]
    (tmp_path / "run.yaml").write_text("\n".join([f"model: {base}", f"data: {data}", *lines]))
    words = ["--output", output, "--rank", 2, "--max-steps", 1]
    invoke("finetune", "--config", tmp_path / "run.yaml", *words)
    used = yaml.safe_load((output / "options.yaml").read_text())
    assert (used["rank"], used["max_steps"]) == (2, 1)  # from the command line
    assert (used["alpha"], used["batch_size"], used["seq_len"]) == (16.0, 2, 64)
    assert (used["lr"], used["gradient_checkpointing"]) == (1e-3, True)
    assert used["target_modules"] == ["q_proj", "v_proj"]
    assert not {"k", "dropout", "grad_accum"} & used.keys()  # defaults


BAD_FILES = [
    ("k: 1\nrnak: 4", r"run.yaml: unknown key 'rnak'; did you mean --rank\?"),
    ("zebra: 4", r"run.yaml: unknown key 'zebra'"),
    ("config: other.yaml", r"unknown key 'config'"),
    ("- rank", r"run.yaml: expected option names with values, got list"),
    ("a: b: c", r"run.yaml: expected YAML, but it does not parse"),
    ("rank: [1, 2]", r"run.yaml: expected one value for 'rank', got \[1, 2\]"),
    ("rank: 2.5", r"rank: expected an integer, got '2.5'"),
    ("packing: some", r"packing: .*some"),
    ("learning_rat: 1", r"unknown key 'learning_rat'; did you mean --learning_rate\?"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_a_bad_config_file_names_the_key(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    said = invoke("sft", "--config", path, "--model", "m", "--data", "d", code=1)
    assert re.search(message, said), said


def test_a_missing_config_file(tmp_path):
    text = invoke("sft", "--config", tmp_path / "none.yaml", code=1)
    assert "none.yaml: no such file or directory" in text


def test_an_option_of_one_value_is_given_once():
    words = ["sft", "--model", "m", "--data", "d", "--data", "e"]
    for once, again in (("--rank", "--lora_r"), ("--learning_rate", "--lr"), ("--k", "--k")):
        text = invoke(*words, once, 4, again, 8, code=1)
        assert f"{again}: expected this option once" in text


def test_a_name_of_trl_s_stands_for_ours(base, tmp_path):
    data = write_jsonl(tmp_path / "train.jsonl", sums(4))
    words = ["--model_name_or_path", base, "--dataset_name", data]
    words += ["--output", tmp_path / "out", "--per-device-train-batch-size=0"]
    assert "batch_size: expected at least 1, got 0" in invoke("sft", *words, code=1)
    (tmp_path / "run.yaml").write_text("num_train_epochs: -1\n")
    text = invoke("sft", *words[:6], "--config", tmp_path / "run.yaml", code=1)
    assert "epochs: expected a number above 0" in text


ERRORS = [
    ("merge nowhere -o o", "adapter: expected an adapter's directory, but nowhere does"),
    ("inspect data.jsonl", "expected an adapter's directory, but data.jsonl is a file. To"),
    ("merge tuned -o o", "tuned/adapter_config.json names this base; pass --mode"),
    ("import-lora data.jsonl -o o", "lora: expected an adapter's directory, but data"),
    ("generate tuned --temperature nan", "temperature: expected at least 0, got nan"),
    ("generate tuned --max-new-tokens 0", "max_new_tokens: expected at least 1, got 0"),
    ("generate tuned hello", "prompt: expected --prompt with several models"),
    ("generate tuned --prompt x --dtype int4", "bfloat16, float16, got 'int4'."),
    ("generate ./none --prompt x", "model: the directory ./none does not exist"),
    ("evaluate base --data data.jsonl --show -1", "show: expected at least 0, got -1"),
    ("evaluate base --data data.jsonl --limit 0", "limit: expected at least 1, got 0"),
    ("evaluate base --data no.jsonl", "data set, but no.jsonl does not exist"),
    ("push tuned a/b/c --dry-run", "repository: expected owner/name, got 'a/b/c': "),
    ("push base me/x --dry-run", "directory: expected an adapter's or a LoRA's, but"),
    ("push tuned me/x --model ./base --dry-run", "model: expected the base's id on the Hub, got"),
    ("export-lora tuned -o o --format ggml", "format: expected one of peft, gguf, mlx, got 'ggml'"),
    ("export-lora tuned -o o --rank 0", "rank: expected at least 1, got 0"),
    ("export-lora tuned -o o.gguf --model base", "output: expected a folder, but o.gguf is a file"),
    ("demo --seed -1", "seed: expected an integer from 0 to 2**32 - 1, got -1"),
]


@pytest.mark.parametrize(("words", "message"), ERRORS)
def test_errors_are_one_sentence_and_exit_code_1(
    monkeypatch, tmp_path, base, tuned, words, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").touch()
    (tmp_path / "base").symlink_to(base)
    edit(shutil.copytree(tuned, tmp_path / "tuned"), base_model_name_or_path="elsewhere/base")
    text = invoke(*words.split(), code=1)
    assert message in text.partition("Error: ")[2]
    assert "Traceback" not in text


def test_a_lora_is_not_merged_and_its_base_not_loaded(base, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("was loaded"))
    lora = save_lora(base, tmp_path / "lora")
    assert "got 'LORA'; convert" in invoke("merge", lora, "-o", tmp_path / "merged", code=1)


def test_a_prompt_in_the_place_of_a_model(tuned):
    text = invoke("generate", tuned, "what is 2?", code=1)
    assert "Error: targets: expected models, got 'what is 2?'; did you mean --prompt?" in text


def test_short_options():
    words = ["sft", "--model", "m", "--data", "d", "-o", "/dev/null"]
    assert "/dev/null: cannot be written: not a directory" in invoke(*words, code=1)
    assert "Usage" in invoke("sft", "-h")
    assert "targets: expected models" in invoke("generate", "a b", "-p", "hi", code=1)


def test_an_adapter_for_another_model(tuned, tmp_path):
    other = save_base(tmp_path / "other", head_dim=16)
    text = invoke("merge", tuned, "--model", other, "--output", tmp_path / "m", code=1)
    said = text.partition("the adapter does not fit the model. ")[2]
    assert said.startswith("Load it into the model that it was trained on")
    assert said.count("rasa_") == 2  # only two tensors are listed
    assert not (tmp_path / "m").exists()


@pytest.fixture(scope="module")
def with_code(base, tuned, tmp_path_factory) -> Path:
    """A base and a tokenizer with configs that name code; the code writes a file if it runs."""
    folder = tmp_path_factory.mktemp("code")
    for name in ("base", "tokenizer"):
        shutil.copytree(base if name == "base" else tuned, folder / name)
        (folder / name / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    path = folder / "base" / "config.json"
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    path.write_text(json.dumps({"model_type": "mine", "auto_map": names}))
    own = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", None]}}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(own))
    return folder


WITH_CODE = [
    "merge {tuned} --model {code}/base --output {out}",
    "generate {code}/tokenizer --prompt x",
    "finetune --model {code}/base --data {data} --output {out}",
    "inspect --model {code}/base",
]


@pytest.mark.parametrize("words", WITH_CODE, ids=lambda words: words.split()[0])
def test_code_that_comes_with_a_model_is_not_run(words, with_code, tuned, tmp_path):
    data, output = write_jsonl(tmp_path / "train.jsonl", sums(4)), str(tmp_path / "out")
    places = {"tuned": tuned, "code": with_code, "data": data, "out": output}
    words = [word.format(**places) for word in words.split()]
    result = CliRunner().invoke(app, words, input="y\n" * 9, env={"COLUMNS": "200"})
    assert not (with_code / "ran").exists()
    assert result.exit_code == 1, result.output
    text = " ".join(result.output.split())
    assert re.search(r"Error: model: '\S+' wants to run Python code that comes with it", text)
    assert "trust_remote_code" not in text
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named_with_how_to_install_them(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "typer" else find(name)
    )
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "typer" in line
    assert 'pip install ".[train]"' in line
