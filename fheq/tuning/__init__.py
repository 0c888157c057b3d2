"""Graphs and quantizers made better: pruning, equalization, rounding of weights, correction of biases, edits."""
