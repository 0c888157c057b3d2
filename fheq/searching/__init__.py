"""The parts of `fheq.search`: what it tries, how it judges, and the front that it finds."""
