"""Trains heads: banks of them, batches, the loss, the loop, workers, progress."""
