"""What graph rewrites are made of: folding and types, editing, BatchNormalization, decompositions. See `fheq.rewrites`."""
