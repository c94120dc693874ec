"""A local web page and API."""
