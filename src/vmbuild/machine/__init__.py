"""Run a machine."""
