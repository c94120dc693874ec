"""Self-critical training, on the CIDEr of sampled captions."""
