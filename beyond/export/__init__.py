"""Exports a run as a SavedModel or for LiteRT."""
