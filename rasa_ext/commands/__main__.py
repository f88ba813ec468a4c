"""``python -m rasa_ext.commands``, which ``accelerate launch`` runs."""

from rasa_ext.commands import main

main()
