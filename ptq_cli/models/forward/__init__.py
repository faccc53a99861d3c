"""A model's own forward, in NumPy."""
