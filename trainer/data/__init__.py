"""Data loading: index, sampling order, fetching, decoding, augmentation and batches."""
