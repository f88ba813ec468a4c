"""Fine-tune by the command, with the options in a folder's options.yaml."""

from __future__ import annotations

import os
import sys
import time

from rasa_ext.commands import main

if __name__ == "__main__":
    sys.argv = ["rasa-ext", "finetune", "--config", f"{sys.argv[1]}/options.yaml"]
    try:
        main()
    except SystemExit as done:
        # Exit at once, because gloo's shutdown has hung beyond a test's timeout.
        sys.stdout.flush()
        time.sleep(1)  # until the other process has left the last collective
        os._exit(int(done.code or 0))
