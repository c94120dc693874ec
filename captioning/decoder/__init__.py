"""What the decoder computes with: its fast loop, losses, and the searches for captions."""
