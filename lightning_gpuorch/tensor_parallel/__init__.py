"""Tensor-parallel plans: found by probing, verified, applied, loaded."""
