"""What makes a sampled response right, and where code that nobody has read runs."""
