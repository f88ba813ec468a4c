"""vLLM on a CPU, without the plug-in: the printed server command."""

import pytest

from tests.readers.commands import exported
from tests.readers.environments import VLLM
from tests.readers.likeliest import off, prompts
from tests.readers.servers import complete, served

pytestmark = pytest.mark.readers


def test_the_server_as_printed(case, tmp_path, measured):
    """The server serves the initial adapter, the base, and an adapter loaded over HTTP."""
    loras = exported(case, tmp_path)
    _, words = loras["first"]
    assert words[:2] == ["vllm", "serve"]
    names = {"first": loras["first"][0].name, "base": str(case.base), "second": "pushed"}
    found = {}
    with served("vllm", words, tmp_path / "log", **VLLM) as post:
        post("/v1/load_lora_adapter", {
            "lora_name": names["second"], "lora_path": str(loras["second"][0])
        })  # fmt: skip
        for name, model in names.items():
            told = [complete(post, model, case.prompts[i][:n]) for i, n in prompts(case)]
            found[name] = off(case, name, told, 20)
    measured("vLLM, the server as printed, an adapter loaded while it runs", found)
