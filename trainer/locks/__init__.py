"""One writer per place: locks with a lease on folders and object store prefixes."""
