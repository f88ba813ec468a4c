"""Methods and optimizers of papers about low-rank adaptation, on the public names of rasa_ext."""
