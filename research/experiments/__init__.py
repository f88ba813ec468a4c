"""Experiments that check RaSA's claims on real weights and in training, one command each."""
