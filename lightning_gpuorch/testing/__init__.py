"""Doubles and fault plans for tests, ours and yours."""
