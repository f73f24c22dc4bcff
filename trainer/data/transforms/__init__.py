"""Augmentations: each draws from random streams that depend on the sample only."""
