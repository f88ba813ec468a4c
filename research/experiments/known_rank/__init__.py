"""Tasks whose weight change has a known rank: held-out loss against rank, by depth."""
