"""Adapters in inference servers, as they were saved: a plug-in of vLLM.

vLLM finds `register` by the entry point ``vllm.general_plugins``, and calls it in every process.
"""

from __future__ import annotations


def register() -> None:
    """Let vLLM load the folders of this package's adapters; vLLM calls this.

    ``RASA_EXT_VLLM_POOLS`` chooses how: unset, an adapter becomes a LoRA of its effective rank.
    With "shared" the pools stay shared, for k up to 1; with "shared:4" for k up to 4.

    Raises:
        ValueError: ``RASA_EXT_VLLM_POOLS`` has another value.

    Example:
        >>> from rasa_ext.serving import register
        >>> register()  # without vLLM, or with a vLLM that it does not fit, it does nothing
    """
    # Not at the top: the entry point is imported in processes that load no adapter.
    from rasa_ext.serving.vllm import install

    install()
