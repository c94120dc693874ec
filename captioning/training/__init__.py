"""The parts of train.py: batches, optimizer, checkpoints, validation, log."""
