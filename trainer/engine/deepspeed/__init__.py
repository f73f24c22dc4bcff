"""Everything that knows how DeepSpeed works inside; no other package uses its attributes."""
