"""Statistics of inputs, from wherever they come."""
