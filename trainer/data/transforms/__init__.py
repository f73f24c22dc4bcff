"""Augmentations, each driven by random streams that depend only on the sample."""
