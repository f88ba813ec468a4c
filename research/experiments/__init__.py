"""What RaSA's claims look like on real weights and in training, each with one command."""
