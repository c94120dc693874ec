"""Training of the CNN together with the decoder."""
