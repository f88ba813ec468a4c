"""The file commands with a mixture of experts: sizes, layouts, one line per group."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

import rasa_ext
from rasa_ext.checkpoint.files import read_config
from rasa_ext.commands import export_lora
from rasa_ext.commands.inspection import read_groups
from tests.helpers.adapter_folders import changes_in
from tests.helpers.cli import invoke, load
from tests.helpers.expert_files import RANK, adapted, build
from tests.helpers.experts import EXPERTS, HIDDEN, INNER
from tests.helpers.tiny_lm import make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")

GROUPINGS = {"slot": 1, "layer": 1, "shared": RANK}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """A base, and an adapter for each grouping; the "shared" one has only a pool."""
    folder = tmp_path_factory.mktemp("experts")
    build("mixtral").save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    base = load(folder / "base")
    for grouping, k in GROUPINGS.items():
        rasa_ext.save_adapter(adapted(base, grouping, k), folder / grouping)
    return {name: folder / name for name in ("base", *GROUPINGS)}


def groups_in(adapter: Path):
    """Return groups, other tensors and the number of trained parameters."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    trained = [t.numel() for name, t in tensors.items() if not name.endswith("rasa_slots")]
    return *read_groups(read_config(adapter), tensors, adapter), sum(trained)


def size_of(lora: Path) -> float:
    return sum(t.nbytes for t in load_file(lora / "adapter_model.safetensors").values()) / 2**20


@pytest.mark.parametrize("layout", [None, "peft"])
def test_export_for_peft(layout, places, tmp_path, recwarn):
    words = [] if layout is None else ["--expert-layout", layout]
    text = invoke("export-lora", places["slot"], "--output", tmp_path / "lora", *words)
    assert f"The LoRA takes {size_of(tmp_path / 'lora'):.2f} MiB." in text
    assert text.index("The LoRA takes") < text.index("LoRA of rank 4 in")
    said = "PEFT loads it, and so does vLLM if it stores the model's experts in three dimensions"
    assert said in text
    assert "vllm serve" not in text
    warned = [str(w.message) for w in recwarn if "--expert-layout per-expert" in str(w.message)]
    assert len(warned) == (layout is None)


def test_export_for_servers(places, tmp_path):
    words = ["export-lora", places["layer"], "--output", tmp_path / "lora"]
    text = invoke(*words, "--expert-layout", "per-expert")
    assert f"vllm serve {places['base']} --dtype float32 --enable-lora --max-lora-rank 8" in text
    assert "model.layers.1.block_sparse_moe.experts.4.w2" in changes_in(tmp_path / "lora")


def test_export_for_sglang(places, tmp_path):
    lora = tmp_path / "lora"
    words = ("--output", lora, "--expert-layout", "shared-outer")
    text = invoke("export-lora", places["shared"], *words)
    assert "vllm serve" not in text
    assert f"sglang.launch_server --model-path {places['base']} --enable-lora" in text
    assert f"--max-lora-rank {2 * RANK} --experts-shared-outer-loras" in text
    assert f"--lora-paths lora={lora}" in text


def test_a_large_export_asks(places, tmp_path, monkeypatch):
    """Only a LoRA with experts asks; a LoRA of linear layers does not."""
    assert export_lora.LARGE == 1024**3
    monkeypatch.setattr(export_lora, "LARGE", 1000)
    words = ["export-lora", places["slot"], "--output", tmp_path / "lora"]
    words += ["--expert-layout", "peft"]
    text = invoke(*words, code=1)
    assert text.index("The LoRA takes") < text.index("Error: yes: the LoRA would take")
    assert "nothing was written; pass --yes to write it" in text
    assert not list(tmp_path.iterdir())
    assert "LoRA of rank 4" in invoke(*words, "--yes")
    with pytest.warns(UserWarning, match="untouched"):
        linear = rasa_ext.patch_model(load(places["base"]), 3, 1)
    rasa_ext.save_adapter(linear, tmp_path / "adapter")
    text = invoke("export-lora", tmp_path / "adapter", "--output", tmp_path / "linear")
    assert "vllm serve" in text


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_inspect_has_a_line_for_each_group(grouping, places):
    groups, other, count = groups_in(places[grouping])
    stacked = [group for group in groups if group.experts]
    assert [len(group.ranks) for group in stacked] == ([1] * 4 if grouping == "layer" else [2, 2])
    for group in stacked:
        up = "gate_up" in group.pattern
        assert group.shape == ((2 * INNER, HIDDEN) if up else (HIDDEN, INNER))
        assert group.experts == EXPERTS
        pooled = {"slot": 2, "layer": EXPERTS, "shared": 2 * RANK}[grouping]
        assert set(group.ranks) == {(RANK - GROUPINGS[grouping], pooled)}
    assert not other
    assert sum(group.parameters for group in groups) == count
    text = invoke("inspect", places[grouping])
    assert f"{count:,} parameters" in text
    assert f"rasa_experts {grouping}" in text
    assert text.count(f"{EXPERTS} x {2 * INNER} x {HIDDEN}") == (2 if grouping == "layer" else 1)
    text = invoke("inspect", places[grouping], "--spectrum")
    assert f"{EXPERTS} x {HIDDEN} x {INNER}" in text
    assert f" of {pooled} " in text
    assert "Means over layers and experts." in text


def test_inspect_plans_experts(places):
    text = invoke("inspect", places["base"], "--rank", 3, "--k", 1, "--experts", "slot")
    assert f"5 x {2 * INNER} x {HIDDEN} 4" in text
    assert f"trainable: {groups_in(places['slot'])[2]:,} of" in text
    assert "experts: expected" in invoke("inspect", places["base"], "--experts", "all", code=1)
