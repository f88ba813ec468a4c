"""Fine-tune by the command, with the options in a folder's options.yaml.

``INTERRUPT_AFTER`` is a number of steps after which the last process alone interrupts itself.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from rasa_ext.commands import main, training
from rasa_ext.commands.callbacks import MetricsCallback

AFTER = "INTERRUPT_AFTER"


class Interrupting(MetricsCallback):
    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if (state.global_step, args.process_index + 1) == (int(os.environ[AFTER]), args.world_size):
            os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    if AFTER in os.environ:
        training.MetricsCallback = Interrupting
    sys.argv = ["rasa-ext", "finetune", "--config", f"{sys.argv[1]}/options.yaml"]
    try:
        main()
    except SystemExit as done:
        # Exit at once, because gloo's shutdown has hung beyond a test's timeout.
        sys.stdout.flush()
        time.sleep(1)  # until the other process has left the last collective
        os._exit(int(done.code or 0))
