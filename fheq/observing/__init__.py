"""What is seen of tensors in calibration, and the ranges that follow from it."""
