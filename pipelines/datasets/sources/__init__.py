"""Sources to pack: class folders, ImageNet's tars, idx files."""
