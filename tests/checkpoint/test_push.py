"""Pushing to a local Hub, and loading from it by id."""

import json
import re

import pytest
import torch
import yaml

import rasa_ext
from tests.helpers import tiny_lm
from tests.helpers.adapter_folders import FORMS, write
from tests.helpers.adapter_folders import tuned_lm as model
from tests.helpers.adapters import content
from tests.helpers.cli import TOKENS, invoke
from tests.helpers.hub import TOKEN, local_hub

ID = "owner/Tiny-LM"
LOCAL = "/home/anna/Tiny-LM"


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    with local_hub(monkeypatch, tmp_path_factory.mktemp("cache")) as hub:
        yield hub


def card(hub, repository: str = "me/sums", revision: str = "main") -> str:
    return hub.files(repository, revision)["README.md"].decode()


@pytest.mark.parametrize("kind", ["directory", "model"])
@torch.no_grad()
def test_what_is_pushed_is_loaded_by_its_id(kind, hub, tmp_path):
    adapted = model()
    rasa_ext.save_adapter(adapted, tmp_path)
    address = rasa_ext.push_to_hub(tmp_path if kind == "directory" else adapted, "me/sums")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/me/sums/commit/[0-9a-f]{40}", address)
    pushed, here = hub.files("me/sums"), content(tmp_path)
    assert pushed.keys() == here.keys()
    assert [name for name in here if here[name] != pushed[name]] == ["README.md"]
    assert 'load_adapter(model, "me/sums")' in card(hub)
    assert '"."' not in card(hub)
    found = rasa_ext.load_adapter(tiny_lm.make_model(), "me/sums")
    assert torch.equal(found(TOKENS).logits, adapted(TOKENS).logits)
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_a_push_replaces_an_earlier_one(hub, tmp_path):
    for rank in (2, 4):
        rasa_ext.save_adapter(model(rank=rank), tmp_path)
        rasa_ext.push_to_hub(tmp_path, "sums", token="hf_other")
    assert hub.tokens == {"Bearer hf_other"}
    assert 'load_adapter(model, "me/sums")' in card(hub)
    assert json.loads(hub.files("me/sums")["adapter_config.json"])["r"] == 4
    found = rasa_ext.load_adapter(tiny_lm.make_model(), "me/sums")
    assert rasa_ext.summary(found)[0].R == 5


@pytest.mark.parametrize("form", FORMS)
def test_a_path_of_this_machine_is_not_pushed(form, hub, tmp_path):
    write(form, model(LOCAL), tmp_path)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=rf"base_model: .*{LOCAL}.*base_model='owner/name'"):
        rasa_ext.push_to_hub(tmp_path, "me/sums")
    assert (hub.created, hub.branches) == ([], {})
    rasa_ext.push_to_hub(tmp_path, "me/sums", base_model=ID)
    pushed = hub.files("me/sums")
    assert not [name for name, data in pushed.items() if b"anna" in data or b"BASE_FOLDER" in data]
    config = json.loads(pushed["adapter_config.json"])
    assert config["model" if form == "mlx" else "base_model_name_or_path"] == ID
    told = f"[{ID}](https://huggingface.co/{ID})"
    assert f"| base model | {told} |" in card(hub)
    head = yaml.safe_load(card(hub).split("---\n")[1])
    assert (head["base_model"], head["base_model_relation"]) == (ID, "adapter")
    assert content(tmp_path) == before


def test_a_card_of_peft_has_no_path_either(hub, tmp_path):
    import peft

    import rasa_ext.peft

    plain = tiny_lm.make_model()
    plain.config._name_or_path = plain.name_or_path = LOCAL
    adapted = peft.get_peft_model(plain, rasa_ext.peft.RasaConfig(r=4, task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path)
    assert "anna" in (tmp_path / "README.md").read_text()
    rasa_ext.push_to_hub(tmp_path, "me/sums", base_model=ID)
    assert not [name for name, data in hub.files("me/sums").items() if b"anna" in data]
    rasa_ext.load_adapter(tiny_lm.make_model(), "me/sums")


def test_an_edited_card_is_pushed_as_edited(hub, tmp_path):
    rasa_ext.save_adapter(model(), tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("## Serve", "It does sums.\n\n## Serve"))
    rasa_ext.push_to_hub(tmp_path, "me/sums")
    assert "It does sums." in card(hub)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "README.md").write_text(card(hub))
    with pytest.warns(UserWarning, match="since it was edited"):
        rasa_ext.save_adapter(model("owner/Other"), tmp_path / "again")
    (tmp_path / "again" / "README.md").write_text("# Mine\n")
    rasa_ext.push_to_hub(tmp_path / "again", "me/mine")
    assert card(hub, "me/mine") == "# Mine\n"


def test_what_a_training_needs_to_go_on_stays_here(hub, tmp_path):
    rasa_ext.save_adapter(model(), tmp_path)
    kept = ("options.yaml", "all_results.json", "training_args.bin", "rng_state_0.pth", ".git/a")
    for name in (*kept, "checkpoint-3/adapter_config.json", "tokenizer.json", "extra/note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    rasa_ext.push_to_hub(tmp_path, "me/sums")
    own = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert hub.files("me/sums").keys() == own | {"tokenizer.json", "extra/note.txt"}


@pytest.mark.parametrize("target", ["secret.txt", "secrets", "nowhere"])
def test_a_link_is_not_followed(target, hub, tmp_path):
    (tmp_path / "secrets").mkdir()
    for path in (tmp_path / "secret.txt", tmp_path / "secrets" / "key.txt"):
        path.write_text("a key")
    adapter = tmp_path / "adapter"
    rasa_ext.save_adapter(model(), adapter)
    (adapter / "link").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=rf"source: .*adapter/link is a link to .*{target}, and"):
        rasa_ext.push_to_hub(adapter, "me/sums")
    assert hub.created == []
    (adapter / "link").rename(adapter / ".link")  # hidden files are not pushed
    rasa_ext.push_to_hub(adapter, "me/sums")
    assert not [name for name, data in hub.files("me/sums").items() if data == b"a key"]


def test_what_is_not_pushed(hub, tmp_path):
    for name in ("empty", "headless", "cut"):
        (tmp_path / name).mkdir()
    rasa_ext.save_adapter(model(LOCAL), tmp_path / "headless")
    path = tmp_path / "headless" / "README.md"
    path.write_text(path.read_text().replace("tags:", "tags: ["))
    rasa_ext.save_adapter(model(), tmp_path / "cut")
    path = tmp_path / "cut" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    for source, said in (
        (tmp_path / "nowhere", "source: .*nowhere is not one"),
        (tmp_path / "empty", "holds no files to push"),
        (tmp_path / "headless", r"README\.md: expected a YAML header"),
        (tmp_path / "cut", "damaged or cut"),
        (tiny_lm.make_model(), "unpatched"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            rasa_ext.push_to_hub(source, "me/sums", base_model=ID)
    assert hub.created == []


def test_an_id_that_the_hub_does_not_have(hub):
    with pytest.raises(FileNotFoundError, match=r"directory: .*'me/nothing'; .*the Hub .*404"):
        rasa_ext.load_adapter(tiny_lm.make_model(), "me/nothing")


def test_a_directory_of_that_name_comes_first(hub, tmp_path, monkeypatch):
    rasa_ext.push_to_hub(model(rank=2), "me/sums")
    monkeypatch.chdir(tmp_path)
    rasa_ext.save_adapter(model(rank=4), "me/sums")
    found = rasa_ext.load_adapter(tiny_lm.make_model(), "me/sums")
    assert rasa_ext.summary(found)[0].R == 5


def test_the_command(hub, tmp_path):
    rasa_ext.save_adapter(model(LOCAL), tmp_path)
    text = invoke("push", tmp_path, "me/sums", "--model", ID, "--dry-run")
    assert "nothing was pushed" in text
    assert set(content(tmp_path)) <= set(text.split())
    assert hub.created == []
    words = ["--model", ID, "--private", "--revision", "v2", "--message", "Sums"]
    text = invoke("push", tmp_path, "me/sums", *words)
    assert re.search(r"http://\S+/me/sums/commit/[0-9a-f]{40}$", text)
    assert hub.messages == ["Sums"]
    assert hub.created[-1]["visibility"] == "private"
    assert hub.files("me/sums") == {}
    assert "adapter_model.safetensors" in hub.files("me/sums", "v2")
