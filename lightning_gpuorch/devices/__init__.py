"""GPUs and their memory: which there are, whether they are healthy, and how much they may give."""
