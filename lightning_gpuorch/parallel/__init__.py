"""Process groups of a replica, and models that are cut across its ranks."""
