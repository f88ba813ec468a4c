"""Methods trained alike, each at rates of its own."""
