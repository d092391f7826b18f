"""What is counted and measured, and the endpoint that shows it."""
