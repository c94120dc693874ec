"""Benchmarks of speed and memory. They are run from the project's folder, as `python -m benchmarks.training`."""
