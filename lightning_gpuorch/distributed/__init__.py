"""Process groups and the control plane of a job."""
