"""Mixes the densities of components: weights by EM on out-of-fold predictions, categories inferred."""
