"""Pushing a directory, or a model's adapter, to the Hub."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

from torch import nn

from rasa_ext._version import __version__
from rasa_ext.checkpoint.adapter import save_adapter
from rasa_ext.checkpoint.card import CARD, card_for_hub, hub_id
from rasa_ext.checkpoint.files import CONFIG, WEIGHTS, read_tensors

_BASE_FIELDS = ("base_model_name_or_path", "model")
"""Fields that name the base: in PEFT's and this package's files, and in mlx-lm's."""

_NOT_PUSHED = re.compile(
    r"(^|/)(\.|checkpoint-|rng_state|"
    r"(options\.yaml|all_results\.json|training_args\.bin|trainer_state\.json)$|"
    r"(optimizer|scheduler|scaler)\.pt$)"
)
"""Hidden files, and files for resuming a training run, some of which contain paths."""


def push_to_hub(
    source: nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    base_model: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    dry_run: bool = False,
) -> str:
    """Push an adapter, or an exported LoRA, to the Hub in one commit.

    ``rasa_ext.load_adapter(model, repo_id)`` loads it from there. Log in first (``hf auth login``,
    or HF_TOKEN). The pushed card's code names the repository instead of a directory. Checkpoints,
    hidden files, and files for resuming a training run, which contain local paths (options.yaml,
    all_results.json), are not pushed.

    Args:
        source: a directory that ``save_adapter``, ``export_lora`` or a command wrote, or a patched
            model, whose adapter is saved for the push.
        repo_id: "owner/name", or "name" for the logged-in user; created if missing.
        base_model: the base's id on the Hub. Needed if the adapter was made over a local folder; it
            replaces the path in the pushed files.
        private: whether a new repository is private; None leaves that to the Hub.
        token: Hub token. Defaults to the login's.
        revision: branch to push to, created if missing. Defaults to the main branch.
        commit_message: message of the commit.
        dry_run: make every check that needs no Hub, and push nothing.

    Returns:
        URL of the commit; in a dry run, the names of the files, a line each.

    Raises:
        FileNotFoundError: there is no such directory, or nothing in it.
        ValueError: the weights are damaged, the adapter names a local path as the base and
            ``base_model`` is None, or the directory holds a link. Nothing was pushed.
        TypeError, ValueError: the model is not patched.
        OSError: the Hub refuses, or does not answer.

    Example:
        >>> model = rasa_ext.patch_model(model, rank=8, k=1)
        >>> rasa_ext.save_adapter(model, "adapter")
        >>> address = rasa_ext.push_to_hub("adapter", "me/adapter", private=True)
        >>> again = rasa_ext.load_adapter(rasa_ext.unpatch(model), "me/adapter")
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with tempfile.TemporaryDirectory() as temporary:
        if isinstance(source, nn.Module):
            save_adapter(source, temporary)
            source = temporary
        folder = Path(source)
        files = _files(folder)
        if WEIGHTS in files:
            read_tensors(folder / WEIGHTS)  # raises for a damaged file
        local, base = _rename_base(files, base_model)
        text = (folder / CARD).read_text(encoding="utf-8") if CARD in files else ""
        card_for_hub(text, repo_id, base, local)  # raises for a bad card before the Hub is called
        if dry_run:
            return "\n".join(files)
        api = HfApi(token=token, library_name="rasa_ext", library_version=__version__)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        if CARD in files:
            files[CARD] = card_for_hub(text, repository, base, local).encode()
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=commit_message or "Upload with rasa_ext",
            revision=revision,
        )
    return str(commit.commit_url)


def _files(folder: Path) -> dict[str, str | bytes]:
    """Return the paths of the files to push, by name in the repository.

    Raises FileNotFoundError if there is none, and ValueError if one is a link, which may point to
    any file of this machine.
    """
    files: dict[str, str | bytes] = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        name = path.relative_to(folder).as_posix()
        if _NOT_PUSHED.search(name):
            continue
        if path.is_symlink():
            raise ValueError(
                f"source: expected files and folders, but {path} is a link to {os.readlink(path)}, "
                "and nothing was pushed; remove it, or replace it with a copy."
            )
        if path.is_file():
            files[name] = str(path)
    if not files:
        raise FileNotFoundError(
            "source: expected a directory that save_adapter or export_lora wrote, but "
            f"{folder} {'holds no files to push' if folder.is_dir() else 'is not one'}."
        )
    return files


def _rename_base(
    files: dict[str, str | bytes], base_model: str | None
) -> tuple[str | None, str | None]:
    """Replace the path of the base in the pushed config by an id on the Hub.

    Returns the path and the id, or None and None if nothing is replaced. Raises ValueError if there
    is a path and no id is known.
    """
    if CONFIG not in files:
        return None, base_model
    config = json.loads(Path(str(files[CONFIG])).read_text(encoding="utf-8"))
    field = next((name for name in _BASE_FIELDS if name in config), None)
    before = config[field] if field else None
    known = base_model or hub_id(str(before or ""))
    if before and known is None:
        raise ValueError(
            "base_model: expected the id of the base on the Hub, since adapter_config.json names a "
            f"path of this machine, {before!r}; pass base_model='owner/name' (--model)."
        )
    if field is None or known == before:
        return None, None
    config[field] = known
    files[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    return before, known
