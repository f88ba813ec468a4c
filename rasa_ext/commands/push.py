"""``rasa-ext push``: push an adapter's directory to the Hub."""

from __future__ import annotations

from pathlib import Path

from rasa_ext.commands.output import command, console
from rasa_ext.commands.paths import is_adapter


@command
def push(
    directory: Path,
    repository: str,
    *,
    model: str | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> None:
    """Push an adapter or an exported LoRA, with its card, to the Hugging Face Hub.

    Args:
        directory: Directory of an adapter or a LoRA.
        repository: Repository to push to, as owner/name; created if missing.
        model: The base's id on the Hub, if the adapter names a local folder.
        private: Make a new repository private.
        revision: Branch to push to. [default: main]
        message: Commit message.
        dry_run: Run every check that needs no Hub, list the files, and push nothing.
    """
    from huggingface_hub import utils

    if (directory / "config.json").is_file() and not is_adapter(directory):
        raise ValueError(
            f"directory: expected an adapter's or a LoRA's, but {directory} is a model's; push it "
            f"with `hf upload {repository} {directory}`."
        )
    try:
        utils.validate_repo_id(repository)  # type: ignore[attr-defined]  # not in its __all__
    except ValueError as error:
        raise ValueError(f"repository: expected owner/name, got {repository!r}: {error}") from None
    from rasa_ext import push_to_hub
    from rasa_ext.checkpoint.card import hub_id

    if model is not None and hub_id(model) is None:
        raise ValueError(f"model: expected the base's id on the Hub, got {model!r}.")
    address = push_to_hub(
        directory,
        repository,
        base_model=model,
        private=private or None,
        revision=revision,
        commit_message=message,
        dry_run=dry_run,
    )
    if dry_run:
        console.print(f"Dry run: nothing was pushed. {repository} would get these files:")
    console.print(address, markup=False)
