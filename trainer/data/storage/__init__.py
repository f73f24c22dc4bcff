"""Bytes of objects, wherever they are: stores, retries, caches, credentials."""
