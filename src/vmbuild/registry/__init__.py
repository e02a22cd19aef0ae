"""A container registry, as a client that pushes sees it."""
