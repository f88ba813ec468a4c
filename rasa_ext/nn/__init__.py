"""Autograd and modules: packs, the low-rank linear, the adapted layers."""
