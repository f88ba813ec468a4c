"""Fine-tuning with transformers' Trainer: what the ``rasa-ext`` command runs.

Needs the extra ``[train]``. Nothing in the rest of the package imports it.
"""
