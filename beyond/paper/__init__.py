"""The paper's decoder and its hard attention."""
