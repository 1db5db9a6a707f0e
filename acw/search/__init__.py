"""Searches recipe fields: spaces, populations that train in one pass, Ray Tune."""
