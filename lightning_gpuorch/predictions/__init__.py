"""Durable predictions: part files, the manifest, leases and the reader."""
