"""What a person sees: captions, plots, tables."""
