"""Who called: PEFT tells a tuner neither the line that asked nor the file that it loads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

_BETWEEN = {"rasa_ext", "peft", "transformers", "trl", "torch", "contextlib"}


def users_level() -> int:
    """Give ``warnings.warn`` the stacklevel of the user's line, whatever library called us for it.

    To be called by the function that warns.
    """
    for level, frame in enumerate(_calls()):
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _BETWEEN:
            return level
    return 1


def adapter_file() -> tuple[str, str] | None:
    """Name the file that ``PeftModel.load_adapter`` is reading, and the adapter; None outside."""
    for frame in _calls():
        if frame.f_code is PeftModel.load_adapter.__code__:
            given = frame.f_locals
            subfolder = given.get("hf_hub_download_kwargs", {}).get("subfolder") or ""
            folder = Path(given["model_id"], subfolder)
            paths = (folder / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
            found = next((path for path in paths if path.is_file()), folder)  # or a hub's name
            return str(found), given["adapter_name"]
    return None


def _calls() -> Iterator[FrameType]:
    """List the calls under way, from the function that asks outwards."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
