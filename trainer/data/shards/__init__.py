"""Tar shards: reading, writing and rejecting what is not exactly representable."""
