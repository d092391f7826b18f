"""Batches by token budget, sized by a model of memory that is fitted online."""
