"""Data sets: where they come from and how their annotations are read."""
