"""Reproduce the paper's figures on the weight changes of a real fine-tune."""
