"""Finished predictions, read in dataset order and exported."""
