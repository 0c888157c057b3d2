"""concrete's optimizer in numpy: noise, partitions and the search for the cheapest TFHE parameters, for `fheq.cost`."""
