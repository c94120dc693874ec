"""HTML pages of captions and where the model attended."""
