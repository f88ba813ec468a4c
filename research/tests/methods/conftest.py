"""The fixture of the core's tests of finetune."""

from tests.commands.conftest import common  # noqa: F401
