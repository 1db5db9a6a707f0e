"""Scores: metrics, gold standard, intervals, other models, the benchmark file."""
