"""Build-time code, which is neither installed nor imported by the package."""
