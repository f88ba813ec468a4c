"""Adapter directories: this package's, those of the official code, and plain LoRAs."""
