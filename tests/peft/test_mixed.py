"""``adapter_names`` in forward and generate: each row of a batch uses its own adapter."""

import functools

import pytest
import torch
from torch.utils.checkpoint import CheckpointError, checkpoint

from rasa_ext.peft import RasaConfig
from tests.helpers.models import T5
from tests.helpers.peft import TOKENS, adapted, close, dense, named, two
from tests.helpers.tiny_lm import make_model

ROWS = torch.cat([TOKENS, TOKENS.flip(0)])
NAMES = ["second", "default", "__base__", "second"]


def test_each_row_goes_through_its_own_adapter():
    """Each row's logits match the oracle, for adapters of different ranks and layers and none."""
    model = two()
    expected = {"default": dense(model, "default"), "second": dense(model, "second")}
    expected["__base__"] = dense(model)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = model(input_ids=ROWS, adapter_names=NAMES).logits
        for row, (name, source) in enumerate(zip(NAMES, [0, 1, 1, 0], strict=True)):
            close(found[row], expected[name][source])
    assert (expected["default"] - expected["second"]).abs().max() > 1e-2
    close(model(TOKENS).logits, expected["default"])  # the next plain forward is unaffected
    model.set_adapter("second")  # the active adapter does not matter
    assert torch.equal(model(input_ids=ROWS, adapter_names=NAMES).logits, found)
    with model.disable_adapter():
        logits = model(input_ids=ROWS, adapter_names=NAMES).logits
    assert torch.equal(logits, make_model()(ROWS).logits)


def test_a_module_trained_in_full_goes_with_its_adapter():
    """Rows of an adapter without such a module use the base's module."""
    model = two(modules_to_save=["lm_head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    found = model(input_ids=ROWS, adapter_names=NAMES).logits
    close(found[1], 1.5 * dense(model, "default")[1])
    close(found[2], dense(model)[1])
    close(found[0], dense(model, "second")[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_generate(beams):
    model = two()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    prompt = ROWS[:, :4]
    together = model.generate(input_ids=prompt, adapter_names=NAMES, **options)
    for row, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(input_ids=prompt[row : row + 1], **options)
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=prompt[row : row + 1], **options)
        length = alone.shape[1]
        assert torch.equal(together[row, :length], alone[0])
        assert not together[row, length:].any()  # padding


def test_beams_of_an_encoder_and_decoder():
    """The encoder sees each row once, the decoder once per beam."""
    model = adapted(T5.build()).eval()
    model.add_adapter("second", RasaConfig(r=2, target_modules=["q"], init_weights=False))
    ids = torch.arange(10).view(2, 5) + 1
    options = {"max_new_tokens": 4, "num_beams": 2, "decoder_start_token_id": 0}
    together = model.generate(input_ids=ids, adapter_names=["default", "second"], **options)
    for row, name in enumerate(["default", "second"]):
        model.set_adapter(name)
        alone = model.generate(input_ids=ids[row : row + 1], **options)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])
    assert len(named(model, "second")) < len(named(model, "default"))


@pytest.mark.parametrize(
    ("reentrant", "error", "message"),
    [(True, ValueError, "^adapter_names: "), (False, CheckpointError, "tensors")],
)
def test_checkpoints_that_would_recompute_without_the_rows_are_refused(reentrant, error, message):
    """Otherwise the second adapter would get no gradient, and the first one another's."""
    model = two()

    def checkpointed(forward, x, **options):
        return checkpoint(functools.partial(forward, **options), x, use_reentrant=reentrant)

    for layer in model.base_model.model.model.layers:
        layer.forward = functools.partial(checkpointed, layer.forward)
    x = model.get_input_embeddings()(ROWS).requires_grad_()
    with pytest.raises(error, match=message):
        model(inputs_embeds=x, adapter_names=NAMES).logits.sum().backward()
    with torch.no_grad():
        found = model(inputs_embeds=x, adapter_names=NAMES).logits
    close(found[0], dense(model, "second")[0])


UNFIT = [
    ("default", None, TypeError, "expected a list with a name for each row, got 'default'"),
    ([None] * 4, None, TypeError, "expected a list with a name for each row"),
    (["third"] * 4, None, ValueError, "expected some of __base__, default, second, got third"),
    (["second"] * 3, None, ValueError, "got 3 names for 4 rows"),
    (NAMES, "train", ValueError, "is for inference; call model.eval"),
    (NAMES, "merge_adapter", ValueError, "is merged.*call model.unmerge_adapter"),
]


@pytest.mark.parametrize(("names", "prepare", "error", "message"), UNFIT)
def test_what_does_not_fit_is_refused(names, prepare, error, message):
    model = two()
    expected = dense(model, "default")
    if prepare:
        getattr(model, prepare)()
    with pytest.raises(error, match=f"^adapter_names: .*{message}"):
        model(input_ids=ROWS, adapter_names=names)
    close(model.eval()(TOKENS).logits, expected)
