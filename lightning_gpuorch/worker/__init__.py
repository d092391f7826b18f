"""One rank: its session in the job, the predict call, steps that survive running out of memory, and batches by tokens."""
