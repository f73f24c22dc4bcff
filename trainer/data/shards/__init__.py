"""Tar shards: reads and writes them, and rejects anything that cannot be represented exactly."""
