"""The nouns: frozen values that cross the walls of the house."""
