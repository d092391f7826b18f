"""Part files, the manifest, and the journal of both."""
