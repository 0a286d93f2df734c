"""Which layers to trust: sweeps of a policy's settings on a model of your own."""
