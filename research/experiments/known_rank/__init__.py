"""Measure held-out loss against rank on tasks that need a weight change of known rank."""
