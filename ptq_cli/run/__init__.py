"""The loops, and where their units are worked on."""
