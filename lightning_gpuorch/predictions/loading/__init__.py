"""From a dataloader to leased batches."""
