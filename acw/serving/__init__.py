"""Serves a model: a page in the browser, and the same for programs."""
