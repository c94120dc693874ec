"""A page and an API on this machine that caption images."""
