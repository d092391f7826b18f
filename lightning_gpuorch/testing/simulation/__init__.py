"""A job in one process on a virtual clock: coordinator, node registry, leases and journal are the product's own code."""
