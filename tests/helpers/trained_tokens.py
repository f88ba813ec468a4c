"""Patch models of many kinds so that some rows of their embeddings are trained."""

import torch

from rasa_ext.nn.trained_tokens import TrainedTokens
from tests.helpers.adapters import patched
from tests.helpers.models import BERT, GPT2, LLAMA, T5, TIED

IDS = [5, 30, 11]
TABLES = {
    LLAMA.name: ("model.embed_tokens",),
    GPT2.name: ("transformer.wte", "lm_head"),
    T5.name: ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"),
    BERT.name: ("bert.embeddings.word_embeddings",),
    TIED.name: ("embed", "readout"),
}
"""The modules of each model that read the trained rows; the first one owns them."""


def with_moved_rows(entry, given=IDS, dtype=torch.float32, **options):
    """Return a patched model with randomized rows and adapters."""
    model = patched(entry.build().to(dtype), trainable_token_indices=given, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, TrainedTokens) and module.owner is None:
                module.rows.add_(torch.randn(module.rows.shape, generator=generator))
    return model.eval()
