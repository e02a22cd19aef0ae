"""Fetch a guest image."""
