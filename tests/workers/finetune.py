"""Fine-tune by the command, with the options in a folder's options.yaml."""

from __future__ import annotations

import sys

from rasa_ext.commands import main

if __name__ == "__main__":
    sys.argv = ["rasa-ext", "finetune", "--config", f"{sys.argv[1]}/options.yaml"]
    main()
