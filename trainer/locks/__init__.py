"""Locks with a lease on folders and object store prefixes: one writer per location."""
