"""Streams that are read by shard: each shard by one replica, so that each byte of the source is read once per job."""
