"""The studies, one per file; each file defines `STUDY`."""
