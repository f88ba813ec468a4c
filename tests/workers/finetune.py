"""Fine-tune by the command, with the options in a folder's options.yaml.

The variable ``INTERRUPT_AFTER`` is the step after which the second process interrupts itself.
``FSDP_VERSION`` makes accelerate shard on CPUs.
"""

import functools
import os
import sys
import time
from typing import Any

from transformers import Trainer

from rasa_ext.commands import main
from tests.helpers.finetuning import interrupting
from tests.workers.trainer import shard_on_cpus


def sharding() -> None:
    """Make every Trainer shard, once the arguments have begun their process group."""
    begin = Trainer.__init__

    @functools.wraps(begin)
    def sharded(self: Trainer, *args: Any, **options: Any) -> None:
        shard_on_cpus()
        begin(self, *args, **options)
        assert self.is_fsdp_enabled

    Trainer.__init__ = sharded


if __name__ == "__main__":
    second = os.environ["RANK"] == "1"
    stop_at = int(os.environ.get("INTERRUPT_AFTER", "0")) if second else 0  # no step is 0
    sys.argv = ["rasa-ext", "sft", "--config", f"{sys.argv[1]}/options.yaml"]
    if "FSDP_VERSION" in os.environ:
        sharding()
    try:
        with interrupting(stop_at):
            main()
    except SystemExit as done:
        # Exit at once, because gloo's shutdown has hung beyond a test's timeout.
        sys.stdout.flush()
        time.sleep(1)  # until the other process has left the last collective
        os._exit(int(done.code or 0))
