"""mlx-lm on a CPU: adapters in its format for every family, and the printed server command."""

import json

import pytest
import torch
from safetensors.torch import load_file

import rasa_ext
from tests.readers.commands import exported
from tests.readers.conftest import difference
from tests.readers.environments import ask
from tests.readers.families import FAMILIES, adapted
from tests.readers.likeliest import LIMIT
from tests.readers.servers import served

pytestmark = pytest.mark.readers


def log_probabilities(path: str) -> list[torch.Tensor]:
    found = load_file(path)
    return [found[str(i)] for i in range(len(found))]


@pytest.fixture(scope="module")
def loras(case, tmp_path_factory):
    """Both adapters in mlx-lm's format, with the printed commands."""
    return exported(case, tmp_path_factory.mktemp("mlx"), "--format", "mlx")


def test_every_log_probability(case, loras, tmp_path, measured):
    asked = [
        {
            "base": str(case.base),
            "adapter": str(loras[name][0]) if name in loras else None,
            "tokens": case.prompts,
            "out": str(tmp_path / f"{name}.safetensors"),
        }
        for name in case.expected
    ]
    told = ask("mlx", "ask_mlx.py", asked, tmp_path)
    found = {
        name: difference(log_probabilities(path), case.expected[name])
        for name, path in zip(case.expected, told, strict=True)
    }
    measured("mlx-lm, every log-probability", found)


def test_every_family(tmp_path, figure):
    """mlx-lm would refuse a wrong name, and a wrong axis would change the log-probabilities."""
    tokens, asked, expected = [list(range(3, 15))], [], {}
    for family in FAMILIES:
        model, folder = adapted(family), tmp_path / family
        rasa_ext.export_lora(model, folder / "mlx", format="mlx")
        with torch.no_grad():
            expected[family] = model(torch.tensor(tokens)).logits[0].log_softmax(-1)
        base = rasa_ext.unpatch(model)
        with torch.no_grad():
            without = base(torch.tensor(tokens)).logits[0].log_softmax(-1)
        assert (without - expected[family]).abs().max() > 0.5, family
        base.save_pretrained(folder / "base")
        _name_rope_theta(folder / "base" / "config.json")
        asked.append(
            {
                "base": str(folder / "base"),
                "adapter": str(folder / "mlx"),
                "tokens": tokens,
                "out": str(folder / "out.safetensors"),
            }
        )
    told = ask("mlx", "ask_mlx.py", asked, tmp_path)
    found = {
        family: difference(log_probabilities(path), [expected[family]])
        for family, path in zip(FAMILIES, told, strict=True)
    }
    figure(f"mlx-lm, by family: {found}")
    assert max(found.values()) < LIMIT, found


def _name_rope_theta(path) -> None:
    config = json.loads(path.read_text())
    rope = config["rope_parameters"]
    config["rope_theta"] = rope.get("rope_theta") or rope["full_attention"]["rope_theta"]
    path.write_text(json.dumps(config))


def test_the_server_as_printed(case, loras, tmp_path, measured):
    """The top token's log-probability matches only this adapter, not the other or the base."""
    _, words = loras["first"]
    assert words[0] == "mlx_lm.server"
    asked = {"max_tokens": 1, "temperature": 0.0, "logprobs": True}
    with served("mlx", words, tmp_path / "log") as post:
        told = [post("/v1/completions", {"prompt": text, **asked}) for text in case.texts]
    answers = [each["choices"][0]["logprobs"]["content"][0] for each in told]
    off = {
        name: max(
            abs(answer["logprob"] - each[-1, answer["id"]].item())
            for answer, each in zip(answers, found, strict=True)
        )
        for name, found in case.expected.items()
    }
    measured("mlx-lm, the server as printed", {"first": off["first"]})
    assert min(off["base"], off["second"]) > 100 * LIMIT
