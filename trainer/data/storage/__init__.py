"""Object storage and local folders: stores, retries, caches and credentials."""
