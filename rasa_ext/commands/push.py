"""``rasa-ext push``: an adapter's directory to the Hub."""

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
        directory: Directory of an adapter, or of a LoRA.
        repository: Where to: owner/name; made if missing.
        model: The base's id on the Hub, where the adapter names a local folder.
        private: Make the repository private, where it is new.
        revision: Branch to push to. [default: main]
        message: Message of the commit.
        dry_run: Make every check that needs no Hub, list the files, and push nothing.
    """
    from huggingface_hub import utils

    if (directory / "config.json").is_file() and not is_adapter(directory):
        raise ValueError(
            f"directory: expected an adapter's or a LoRA's, but {directory} is a model's, which "
            f"`hf upload {repository} {directory}` pushes."
        )
    try:
        utils.validate_repo_id(repository)  # type: ignore[attr-defined]  # not in its __all__
    except ValueError as error:
        raise ValueError(f"repository: expected owner/name, got {repository!r}: {error}") from None
    from rasa_ext import push_to_hub

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
        console.print(f"{repository} would get these files, and nothing was pushed:")
    console.print(address, markup=False)
