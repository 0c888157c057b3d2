"""The parts of the converters' interface, `fheq.post_training`."""
