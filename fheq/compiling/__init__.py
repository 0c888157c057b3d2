"""What `fheq.circuit` needs of concrete-python's tracer and runtime."""
