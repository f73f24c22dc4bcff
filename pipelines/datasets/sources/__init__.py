"""Sources to pack: class folders, ImageNet's own tars, idx files."""
