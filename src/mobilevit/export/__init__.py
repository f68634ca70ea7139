"""Deployment: the same function as a faster graph."""
