"""Images: names, reading, the CNN, and the cache of its features."""
