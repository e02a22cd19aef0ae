"""Work in a guest."""
