"""A run as a page, and as a view that refreshes itself."""
