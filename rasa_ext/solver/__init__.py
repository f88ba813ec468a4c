"""Factors nearest to given weight changes."""
