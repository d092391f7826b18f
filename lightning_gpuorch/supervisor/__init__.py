"""One node: starts ranks, judges them from outside, restarts them, and says how the job ended. Imports no torch."""
