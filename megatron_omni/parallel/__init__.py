"""Tensor parallelism: the rank grid, collectives with their gradients, how tensors are cut, and the parallel layers."""
