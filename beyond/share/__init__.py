"""Packs a run into one file, and unpacks it."""
