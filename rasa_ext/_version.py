"""The package's version, in one place that needs no torch to read."""

__version__ = "0.1.0"
