"""Methods and optimizers from papers on low-rank adaptation, built on rasa_ext's public API."""
