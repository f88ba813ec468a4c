"""Compare methods under equal training, each at its own learning rates."""
