"""What two processes of a job say to each other, and the coordinator that answers. Imports no torch."""
