"""Commands of ``rasa-ext``, a module each; pyproject.toml announces them."""
