"""Machine-readable progress of a run: the record, and its publication by the trainer."""
