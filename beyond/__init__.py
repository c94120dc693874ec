"""What goes beyond the tutorial: guests, each in a folder of its own, that nothing outside imports."""
