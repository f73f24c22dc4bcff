"""Datasets: sources, packing into shards, indexing existing shards, verification."""
