"""Small encoded images of every format, for tests of packing."""

import io

import numpy as np
from PIL import Image


def pixels(seed: int = 0, width: int = 12, height: int = 9) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(seed: int = 0) -> bytes:
    return encode(pixels(seed))


def jpeg(seed: int = 0, **options: object) -> bytes:
    return encode(pixels(seed, 40, 30), "JPEG", **options)


DDS = b"DDS " + (124).to_bytes(4, "little") + bytes(200)
"""An image for which Pillow raises NotImplementedError."""

NOT_SUPPORTED = {
    "dds": (DDS, "DDS texture"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
    "psd": (b"8BPS\0\1" + bytes(40), "Photoshop"),
    "ico": (encode(pixels(), "ICO"), "icon"),
    "avif": (b"\0\0\0\x20ftypavif\0\0\0\0" + bytes(40), "AVIF"),
    "heic": (b"\0\0\0\x20ftypheic\0\0\0\0" + bytes(40), "HEIC"),
    "svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "jp2": (encode(pixels(), "JPEG2000"), "JPEG 2000"),
    "html": (b"\n<!DOCTYPE html><html>404</html>", "an HTML page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "zeros": (bytes(3000), "zero bytes"),
    "text": (b"not an image", "not an image"),
    "tga": (encode(pixels(), "TGA"), "not an image"),
}
"""Content, and a part of the reason for its rejection, by format."""
