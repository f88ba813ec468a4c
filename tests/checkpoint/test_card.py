"""Model cards: their contents, running their code, and when README.md is overwritten."""

import os
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import rasa_ext
from rasa_ext.checkpoint.card import BASE_FOLDER, hub_id
from tests.helpers import experts, tiny_lm
from tests.helpers.adapter_folders import FORMS, card, code, rows, write
from tests.helpers.adapter_folders import tuned_lm as model
from tests.helpers.adapters import RANK, content, patched, same_adapters
from tests.helpers.hub import refused
from tests.helpers.methods import CASES, case, rasa_linears
from tests.helpers.models import SEQUENTIAL

ID = "owner/Tiny-LM"
HEAD = re.compile(r"---\n(.*?)\n---\n\n", re.DOTALL)
TOKENS = torch.arange(24).view(2, 12) * 11 % 320


def head(text: str) -> dict:
    return yaml.safe_load(HEAD.match(text)[1])


def test_cards_name_trained_rows(tmp_path):
    adapted = model(trainable_token_indices=[3, 5])
    rasa_ext.save_adapter(adapted, tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"SGLang .*trained rows"):
        rasa_ext.export_lora(adapted, tmp_path / "lora", allow_dropped=True)
    for each in ("adapter", "lora"):
        assert rows(card(tmp_path / each))["trained rows"] == "2 of `model.embed_tokens`"


def test_a_card_says_what_is_known(tmp_path):
    adapted = model(modules_to_save=["lm_head"], dropout=0.1)
    told = rasa_ext.Card(datasets=["owner/data"], sections={"Training": "100 steps"})
    rasa_ext.save_adapter(adapted, tmp_path, card=told)
    text = card(tmp_path)
    assert head(text) == {
        "base_model": ID,
        "base_model_relation": "adapter",
        "library_name": "rasa_ext",
        "pipeline_tag": "text-generation",
        "datasets": ["owner/data"],
        "tags": ["rasa", "lora"],
    }
    assert refused(text) is None
    table = rows(text)
    assert f"[{ID}](https://huggingface.co/{ID})" in table["base model"]
    assert "RaSA" in table["method"]
    assert (table["rank"], table["k"], table["dropout"]) == (str(RANK), "1", "0.1")
    assert table["trained in full"] == "`lm_head`"
    assert "gates" not in table
    for row in rasa_ext.summary(adapted):
        shape = f"{row.shape[0]} x {row.shape[1]}"
        assert f"| `{row.pattern}` | {row.L} | {shape} | {row.R} |" in text
    assert "\n## Training\n\n100 steps\n" in text
    assert "ore information needed" not in text.lower()


def test_a_head_is_yaml_whatever_its_strings_are(tmp_path):
    told = rasa_ext.Card(datasets=["no", "1.0", "a: b", "käse", 'a"b'])
    rasa_ext.save_adapter(model("2026-01-01"), tmp_path, card=told)
    found = head(card(tmp_path))
    assert found["datasets"] == list(told.datasets)
    assert found["base_model"] == "2026-01-01"


@pytest.fixture(params=CASES)
def name(request) -> str:
    return request.param


def test_every_method_s_ranks(name, tmp_path):
    adapted = case(name)
    rasa_ext.save_adapter(adapted, tmp_path)
    text = card(tmp_path)
    config = next(iter(rasa_linears(adapted).values())).config
    assert head(text)["tags"][0] == config.method
    for row in rasa_ext.summary(adapted):
        ranks = str(row.R) if row.R_min == row.R else f"{row.R_min} to {row.R}"
        assert re.search(rf"^\| `{re.escape(row.pattern)}` \|.*\| {ranks} \|$", text, re.MULTILINE)


def test_adapted_experts(tmp_path):
    adapted = experts.patched(experts.model("mixtral"), "slot", 3, 1)
    rasa_ext.save_adapter(adapted, tmp_path)
    (stacked,) = {row.experts for row in rasa_ext.summary(adapted) if row.experts}
    assert re.search(rf"`.*experts.*` \| \d \| {stacked} x \d+ x \d+ \| \d+ \|", card(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_many_groups_are_cut_short(tmp_path):
    deep = torch.nn.Sequential(*(torch.nn.Linear(i, i + 1) for i in range(3, 50)))
    rasa_ext.save_adapter(patched(deep, 2, 0), tmp_path)
    assert card(tmp_path).count("| 1 |") == 40
    assert "| 7 more groups |" in card(tmp_path)


def loaded(text: str, folder: Path, monkeypatch, base: str):
    """Run a card's code in ``folder``, loading from ``base``; return the model and names loaded."""
    real, names = AutoModelForCausalLM.from_pretrained, []

    def load(name, *args, **options):
        names.append(name)
        return real(base, *args, **options)

    namespace: dict = {}
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", staticmethod(load))
        patch.chdir(folder)
        exec(code(text), namespace)
    return namespace["model"].eval(), names


@pytest.mark.parametrize("where", ["hub", "folder"])
@pytest.mark.parametrize("form", ["adapter", "peft"])
@torch.no_grad()
def test_the_lines_that_load_it_run(form, where, tmp_path, monkeypatch):
    base = tiny_lm.save_base(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.config._name_or_path = ID if where == "hub" else str(base)
    adapted = patched(plain, RANK, 1)
    write(form, adapted, tmp_path / "out")
    found, names = loaded(card(tmp_path / "out"), tmp_path / "out", monkeypatch, str(base))
    assert names == [ID if where == "hub" else BASE_FOLDER]
    expected = adapted.eval()(TOKENS).logits
    torch.testing.assert_close(found(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_line_of_a_model_that_has_no_name(tmp_path, monkeypatch):
    plain = SEQUENTIAL.build()
    adapted = patched(plain)
    rasa_ext.save_adapter(adapted, tmp_path)
    text = card(tmp_path)
    assert head(text) == {"library_name": "rasa_ext", "tags": ["rasa", "lora"]}
    assert "## Serve" not in text
    monkeypatch.chdir(tmp_path)
    exec(code(text), {"model": plain})
    assert same_adapters(plain, adapted)


LOCAL = [
    "/home/anna/models/Tiny-LM",
    "/home/anna/models/Tiny-LM/",
    "C:\\Users\\anna\\Tiny-LM",
    "../anna/Tiny-LM",
    "~anna/Tiny-LM",
    "/home/anna/Tiny-LM.Q4_1.gguf",
    "anna/models/Tiny-LM",
]


@pytest.mark.parametrize(
    ("form", "path"),
    [("adapter", path) for path in LOCAL] + [(form, LOCAL[0]) for form in ("peft", "gguf", "mlx")],
)
def test_a_path_of_the_base_stays_here(form, path, tmp_path):
    write(form, model(path), tmp_path)
    text = card(tmp_path)
    assert "anna" not in text
    assert str(tmp_path) not in text
    assert "`Tiny-LM" in rows(text)["base model"]
    assert not head(text).keys() & {"base_model", "base_model_relation"}


def test_an_adapter_over_a_gguf_names_the_weights_and_the_call_that_loads_them(tmp_path):
    write("adapter", model("/home/anna/Tiny-LM.Q4_1.gguf"), tmp_path)
    text = card(tmp_path)
    call = 'AutoModelForCausalLM.from_pretrained("BASE_FOLDER", gguf_file="Tiny-LM.Q4_1.gguf")'
    assert call in code(text)
    assert "trained on its Q4_1 weights, dequantized" in text
    assert text.count(" --model BASE_FOLDER/Tiny-LM.Q4_1.gguf\n") == 2


def test_ids_on_the_hub(tmp_path, monkeypatch):
    assert hub_id("gpt2") == "gpt2"
    assert hub_id("owner/Model-1.5_b") == "owner/Model-1.5_b"
    cached = "/home/anna/.cache/huggingface/hub/models--owner--Model/snapshots/0123abc"
    assert hub_id(cached) == "owner/Model"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    assert hub_id("owner") is None


SERVED = [
    ("peft", "peft", f"vllm serve {ID} --dtype float32 --enable-lora --max-lora-rank 8"),
    ("gguf", None, "llama-server -m base.gguf --lora adapter.gguf --cache-ram 0"),
    ("mlx", "mlx", f"mlx_lm.server --model {ID} --adapter-path ."),
]


@pytest.mark.parametrize(("form", "library", "command"), SERVED)
def test_an_export_says_how_it_is_served(form, library, command, tmp_path):
    rasa_ext.save_adapter(model(), tmp_path / "a", card=rasa_ext.Card(["o/d"], {"Data": "Sums."}))
    told = rasa_ext.Card.read(tmp_path / "a")
    assert rasa_ext.export_lora(model(), tmp_path / "lora", format=form, card=told) == 5
    text = card(tmp_path / "lora")
    assert refused(text) is None
    assert head(text).get("library_name") == library
    assert (head(text)["base_model"], head(text)["datasets"]) == (ID, ["o/d"])
    assert rows(text)["rank of the LoRA"] == "5, with scale 1"
    assert "computes the same function" in text
    assert "\n## Data\n\nSums.\n" in text
    assert command in code(text, "bash")
    assert all(shlex.split(line) for line in code(text, "bash").splitlines())


def test_an_export_of_a_lower_rank_says_so(tmp_path):
    rasa_ext.export_lora(model(), tmp_path, rank=2)
    text = card(tmp_path)
    assert rows(text)["rank of the LoRA"] == "2, with scale 1"
    assert "approximates every layer as well as its rank allows" in text
    assert "same function" not in text


@pytest.mark.filterwarnings("ignore")
def test_an_export_that_peft_does_not_load_has_no_lines_for_it(tmp_path):
    adapted = experts.patched(experts.model("mixtral"), "slot", 3, 1)
    for layout in ("peft", "per-expert"):
        rasa_ext.export_lora(adapted, tmp_path, expert_layout=layout)
        assert ("PeftModel" in card(tmp_path)) == (layout == "peft")
        assert rows(card(tmp_path))["experts"] == f"layout `{layout}`"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "edit", [("## Serve", "It does sums.\n\n## Serve"), ("---\n", "---\nlicense: mit\n")]
)
def test_a_card_is_replaced_until_it_is_edited(edit, form, tmp_path, recwarn):
    """Then a warning says when it is out of date."""
    for base in (ID, "owner/Other", ID):
        write(form, model(base), tmp_path)
        assert head(card(tmp_path))["base_model"] == base
    text = card(tmp_path)
    mine = text.replace(*edit, 1)
    assert mine != text
    (tmp_path / "README.md").write_text(mine)
    write(form, model(), tmp_path)
    assert not [each for each in recwarn if "README" in str(each.message)]
    with pytest.warns(UserWarning, match=r"README\.md: left unchanged, since it was edited"):
        write(form, model("owner/Other"), tmp_path)
    assert card(tmp_path) == mine
    assert "owner/Other" in (tmp_path / "adapter_config.json").read_text()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("other", [b"# My project\n", b"\xff\xfe", b""])
def test_a_readme_of_another_origin_stays(other, form, tmp_path, recwarn):
    (tmp_path / "README.md").write_bytes(other)
    write(form, model(), tmp_path)
    assert content(tmp_path)["README.md"] == other
    assert not [each for each in recwarn if "README" in str(each.message)]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_card(form, tmp_path):
    with pytest.raises(TypeError, match=r"card: expected a rasa_ext\.Card or None, got 'text'"):
        write(form, model(), tmp_path / "new", card="text")
    assert not [*tmp_path.iterdir()]
    write(form, model(), tmp_path / "none", card=None)
    assert "README.md" not in content(tmp_path / "none")
    for wrong in ({"datasets": "o/d"}, {"datasets": [1]}, {"sections": "text"}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))}: expected"):
            rasa_ext.Card(**wrong)


def test_what_was_told_is_read_again(tmp_path):
    told = rasa_ext.Card(["o/d", "e"], {"Data": "Sums.\n\n### Of two numbers\n\n- a", "Run": "b"})
    rasa_ext.save_adapter(model(), tmp_path, card=told)
    found = rasa_ext.Card.read(tmp_path)
    assert (list(found.datasets), dict(found.sections)) == (list(told.datasets), told.sections)
    text = card(tmp_path)
    (tmp_path / "README.md").write_text(text.replace("## Run", "## Mine\n\nc\n\n## Run"))
    assert rasa_ext.Card.read(tmp_path).sections["Mine"] == "c"
    (tmp_path / "README.md").write_text("# Another\n\n## Data\n\nNone.\n")
    assert rasa_ext.Card.read(tmp_path) == rasa_ext.Card()
    assert rasa_ext.Card.read(tmp_path / "nowhere") == rasa_ext.Card()
    (tmp_path / "README.md").write_text(text.replace("tags:", "tags: ["))
    with pytest.raises(ValueError, match=rf"{tmp_path}/README\.md: expected a YAML header"):
        rasa_ext.Card.read(tmp_path)


def test_a_card_that_takes_long_to_read_adds_nothing_and_stays(tmp_path):
    huge = rasa_ext.Card(["a/b"] * 50_000, {"More": "text"})
    rasa_ext.save_adapter(model(), tmp_path / "huge", card=huge)
    before = card(tmp_path / "huge")
    assert rasa_ext.Card.read(tmp_path / "huge") == rasa_ext.Card()
    rasa_ext.save_adapter(model(), tmp_path / "huge")
    assert card(tmp_path / "huge") == before
    os.mkfifo(tmp_path / "README.md")
    assert rasa_ext.Card.read(tmp_path) == rasa_ext.Card()
