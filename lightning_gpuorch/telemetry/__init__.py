"""Logs, metrics, events and reports."""
