"""Samples: index, order, fetching, decoding, augmentation, batches."""
