"""What happened, one JSON line each."""
