"""Quantizers and accumulators that a model states itself."""
