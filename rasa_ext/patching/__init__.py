"""A model in place: finding its layers, swapping them, merging, taking the patch off again."""
