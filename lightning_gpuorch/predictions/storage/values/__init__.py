"""Codecs, one module per kind of value: how each becomes a node and columns, and the same value again."""
