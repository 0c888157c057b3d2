"""Where a graph is quantized, and which integer steps run between the tables."""
