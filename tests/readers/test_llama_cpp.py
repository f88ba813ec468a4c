"""llama.cpp: its converters, and its server as a library (xllamacpp)."""

from pathlib import Path

import gguf
import numpy as np
import pytest

import rasa_ext
from tests.readers.commands import printed
from tests.readers.environments import ask
from tests.readers.environments import convert as run_converter
from tests.readers.families import FAMILIES, adapted
from tests.readers.likeliest import COUNT, off, prompts

pytestmark = pytest.mark.readers


@pytest.fixture(scope="module")
def exported(case, tmp_path_factory) -> list[str]:
    """Export the first adapter, run the printed conversion, return the server's arguments."""
    out = tmp_path_factory.mktemp("llama_cpp") / "lora"
    words = ["export-lora", case.adapters["first"], "--model", case.base, "--output", out]
    convert, serve = printed(*words, "--format", "gguf")
    assert convert[0] == "python"
    run_converter(*convert[1:])
    assert serve[0] == "llama-server"
    return serve[1:]


def requests(case, lora=None):
    more = {} if lora is None else {"lora": lora}
    return [{"tokens": case.prompts[i][:n], "count": COUNT, **more} for i, n in prompts(case)]


def test_float32_on_and_off_by_request(case, exported, tmp_path, measured):
    """With two adapters loaded, each request turns one of them on, or none."""
    second = tmp_path / "second"
    printed(
        "export-lora", case.adapters["second"], "--model", case.base, "--output", second,
        "--format", "gguf",
    )  # fmt: skip
    words = [*exported, "--lora", str(second / "adapter.gguf")]
    scales = {"first": (1.0, 0.0), "base": (0.0, 0.0), "second": (0.0, 1.0)}
    order = ["first", "base", "second", "first", "base"]
    asked = []
    for name in order:
        lora = [{"id": i, "scale": scale} for i, scale in enumerate(scales[name])]
        asked += requests(case, lora)
    told = ask("llama.cpp", "ask_llama_cpp.py", {"words": words, "requests": asked}, tmp_path)
    found: dict[str, float] = {}
    count = len(prompts(case))
    for i, name in enumerate(order):
        part = told[i * count : (i + 1) * count]
        found[name] = max(found.get(name, 0.0), off(case, name, part))
    measured("llama.cpp, float32 base, two adapters on and off by request", found)


def test_float32_as_printed(case, exported, tmp_path, measured):
    asked = requests(case)
    told = ask("llama.cpp", "ask_llama_cpp.py", {"words": exported, "requests": asked}, tmp_path)
    found = {"first": off(case, "first", told)}
    measured("llama.cpp, float32 base, the commands as printed", found)


def test_over_the_quantized_base(case, tmp_path, figure, record_property):
    """llama.cpp rounds activations to eight bits, so the base has an error of similar size."""
    out = tmp_path / "lora"
    (serve,) = printed("export-lora", case.adapters["first"], "--output", out, "--format", "gguf")
    assert serve[1:3] == ["-m", str(case.gguf)]
    on, without = requests(case), requests(case, [{"id": 0, "scale": 0.0}])
    question = {"words": serve[1:], "requests": on + without}
    told = ask("llama.cpp", "ask_llama_cpp.py", question, tmp_path)
    adapter = off(case, "first", told[: len(on)])
    base = off(case, "base", told[len(on) :])
    lost = off(case, "base", told[: len(on)])
    record_property(f"llama.cpp, Q4_1 base (the base alone: {base:.2g})", adapter)
    figure(f"llama.cpp, Q4_1: adapter {adapter:.2g} off, base {base:.2g}; effect {lost:.2g}")
    assert adapter < 2 * base
    assert lost > 3 * adapter


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    found = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in found.fields.items()}
    names = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
    return {t.name: t.data for t in found.tensors}, {name: fields[name] for name in names}


def same(ours: Path, its: Path) -> None:
    """Check that all tensors are bit-identical, and the fields that the loader reads equal."""
    (tensors, fields), (others, told) = read(ours), read(its)
    assert fields == told
    assert tensors.keys() == others.keys()
    for name, tensor in others.items():
        assert tensor.dtype == tensors[name].dtype
        assert np.array_equal(tensor, tensors[name]), name


def test_the_file_is_the_converter_s(tmp_path):
    """This holds for every family. One process converts all, since importing takes longest."""
    lines = []
    for family in FAMILIES:
        model, folder = adapted(family), tmp_path / family
        rasa_ext.export_lora(model, folder / "peft")
        rasa_ext.export_lora(model, folder / "gguf", format="gguf")
        rasa_ext.unpatch(model).save_pretrained(folder / "base")
        lines.append([folder / "peft", "--base", folder / "base", "--outfile", folder / "its.gguf"])
    (tmp_path / "all.py").write_text(
        f"import runpy, sys\nsys.path.insert(0, '.')\n"
        f"for words in {[list(map(str, words)) for words in lines]}:\n"
        "    sys.argv = ['convert_lora_to_gguf.py', *words]\n"
        "    runpy.run_path('convert_lora_to_gguf.py', run_name='__main__')\n"
    )
    run_converter(tmp_path / "all.py")
    for family in FAMILIES:
        ours = tmp_path / family / "gguf" / "adapter.gguf"
        assert len(read(ours)[0]) >= 2 * 2 * 4
        same(ours, tmp_path / family / "its.gguf")
