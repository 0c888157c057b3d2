"""The parts of `fheq.fit`: from statistics and bits to the quantizers of tensors, weights and accumulators."""
