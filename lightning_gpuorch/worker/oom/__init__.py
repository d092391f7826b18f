"""Batches that do not fit are computed in parts."""
