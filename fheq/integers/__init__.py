"""What the integers of a quantized model are, and stand for: decoders, weights and bounds of accumulators."""
