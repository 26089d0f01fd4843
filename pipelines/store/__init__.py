"""Versions of embedded and clustered documents: publish, roll back, verify, search."""
