"""The settings, their options, and the CNNs to choose from."""
