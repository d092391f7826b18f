"""Faults inside of a tensor-parallel group are repaired in place."""
