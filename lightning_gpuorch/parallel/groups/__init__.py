"""torch.distributed of one replica: process groups that can be aborted and rebuilt."""
