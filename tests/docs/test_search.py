"""The built site's own search finds the right page first. Needs node."""

import json
import shutil
import subprocess

import pytest

from tests.helpers.pages import ROOT

FIRST = {
    "OOM": "troubleshooting/#out-of-memory",
    "QLoRA": "quantized/",
    "LoraConfig": "from-lora/",
    "coming from LoRA": "from-lora/",
    "wandb": "training/#trackers",
    "trackio": "training/#trackers",
    "tensorboard": "training/#trackers",
    "validation": "training/#validation",
    "early stopping": "training/#validation",
    "best checkpoint": "training/#validation",
    "config file": "training/#config-file",
    "continue training": "training/#continue-training",
    "gradient accumulation": "training/#less-memory",
    "NEFTune": "training/#other-methods",
    "resume": "training/#stop-and-resume",
    "learning rate": "hyperparameters/",
    "sweep": "recipes/#sweep",
    "dpo": "recipes/#dpo",
    "grpo": "recipes/#grpo",
    "embeddings": "recipes/#embeddings",
    "vision": "recipes/#images",
    "multi gpu": "distributed/",
    "DDP": "distributed/#ddp",
    "fsdp": "distributed/#fsdp",
    "4-bit": "quantized/#bitsandbytes",
    "gguf": "faq/#does-it-run-in-ollama",
    "Ollama": "faq/#does-it-run-in-ollama",
    "LM Studio": "faq/#does-it-run-in-ollama",
    "Windows": "faq/#does-it-run-on-windows",
    "macOS": "faq/#does-it-run-on-windows",
    "Colab": "faq/#does-it-run-on-windows",
    "licence": "faq/#what-is-the-licence",
    "license": "faq/#what-is-the-licence",
    "citation": "faq/#what-is-the-licence",
}


@pytest.fixture(scope="module")
def first(site):
    """Return the first page or section that the site's search finds, by query."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    (worker,) = site.glob("assets/javascripts/workers/search.*.min.js")
    script = [ROOT / "tests" / "helpers" / "search.js", worker, site / "search/search_index.json"]
    queries = "\n".join([*FIRST, "xylophone"])
    done = subprocess.run(
        ["node", *script], input=queries, check=True, capture_output=True, text=True
    )
    found = map(json.loads, done.stdout.splitlines())
    return dict(zip(queries.split("\n"), found, strict=True))


@pytest.mark.parametrize("query", FIRST)
def test_a_search_leads_to_the_right_page(query, first):
    assert first[query], "nothing was found"
    assert first[query][0].startswith(FIRST[query]), first[query]


def test_a_search_for_what_is_not_there(first):
    assert first["xylophone"] == []
