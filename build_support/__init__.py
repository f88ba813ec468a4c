"""Build-time code: never installed, never imported by the package."""
