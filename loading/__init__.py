"""How images get from a dataset to a process: their order, the workers that decode them, shared memory."""
