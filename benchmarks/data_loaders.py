"""The loaders that benchmarks/data.py compares.

Each yields an epoch of training batches at 224 pixels from the same JPEGs.

A loader is a function of the folder that ``prepare`` filled and the number of workers. It returns
an epoch factory: a function without arguments whose iterator yields the number of images in each
batch. All except ours and DALI produce torch uint8 batches, [batch, 3, side, side] or [batch, side,
side, 3]. Each package is imported only by the loader that uses it.
"""

import json
import math
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from trainer.config.schema import RunConfig

BATCH, SIDE, MIN_AREA = 64, 224, 0.08

Epoch = Callable[[], Iterator[int]]


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Draw left, top, width and height of a crop as torchvision's RandomResizedCrop does."""
    for _ in range(10):
        area = width * height * random.uniform(MIN_AREA, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    return 0, 0, width, height


def _batches(loader: Any) -> Epoch:
    """The epoch factory of a torch loader whose batches begin with the images."""

    def epoch() -> Iterator[int]:
        for batch in loader:
            yield len(batch[0])

    return epoch


def _loader_of(dataset: Any, workers: int, kind: Any = None, **options: Any) -> Epoch:
    from torch.utils.data import DataLoader

    return _batches(
        (kind or DataLoader)(
            dataset, batch_size=BATCH, num_workers=workers, persistent_workers=True, **options
        )
    )


def _pillow_transform() -> Callable[[Any], Any]:
    from torchvision.transforms import v2

    return v2.Compose(
        [v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )


def _pillow_view() -> Callable[[bytes], Any]:
    import io

    from PIL import Image

    transform = _pillow_transform()
    return lambda encoded: transform(Image.open(io.BytesIO(encoded)).convert("RGB"))


def our_config(url: str, workers: int, **data: Any) -> "RunConfig":
    """The recipe of our loader for the batches of the benchmarks."""
    from trainer.config.schema import RunConfig

    values = {"train": url, "image_size": SIDE, "workers": workers, "tail": "drop", **data}
    return RunConfig.model_validate(
        {
            "model": {"name": "resnet50"},
            "data": values,
            "batch": {"global_size": BATCH},
            "train": {"max_steps": 1},
        }
    )


def ours(folder: Path, workers: int) -> Epoch:
    from trainer.data.index import open_index
    from trainer.data.loader import train_loader

    url = str(folder / "shards" / "train")
    config = our_config(url, workers)
    index, store = open_index(url)
    epochs = iter(range(1_000_000))

    def epoch() -> Iterator[int]:
        for batch in train_loader(config, index, store, next(epochs), 1, 0, 1):
            yield len(batch.pixels)

    return epoch


def ours_decode_only(folder: Path, workers: int) -> Epoch:
    """``decode_crop`` in threads, with the files in memory: the upper bound for our loader."""
    from trainer.data.decode.decoder import decode_crop

    contents = [path.read_bytes() for path in sorted((folder / "images").rglob("*.JPEG"))]

    def make(first: int) -> int:
        chosen = contents[first : first + BATCH]
        batch = np.empty((len(chosen), SIDE, SIDE, 3), np.uint8)
        for place, encoded in enumerate(chosen):
            decode_crop(encoded, random_box, batch[place], random.random() < 0.5)
        return len(batch)

    def epoch() -> Iterator[int]:
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(make, range(0, len(contents), BATCH))

    return epoch


def imagefolder(folder: Path, workers: int) -> Epoch:
    from torchvision.datasets import ImageFolder

    return _loader_of(
        ImageFolder(str(folder / "images"), _pillow_transform()), workers, shuffle=True
    )


def _webdataset(folder: Path, workers: int, view: Callable[[bytes], Any]) -> Epoch:
    import webdataset as wds

    shards = sorted(str(path) for path in (folder / "shards" / "train").glob("*.tar"))
    dataset = wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False).shuffle(500)
    dataset = dataset.to_tuple("jpeg;jpg", "cls").map_tuple(view, int)
    return _loader_of(dataset, workers)


def webdataset_pillow(folder: Path, workers: int) -> Epoch:
    return _webdataset(folder, workers, _pillow_view())


def webdataset_torchvision(folder: Path, workers: int) -> Epoch:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import v2

    transform = v2.Compose([v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip()])

    def view(encoded: bytes) -> Any:
        return transform(
            decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)
        )

    return _webdataset(folder, workers, view)


def webdataset_simplejpeg(folder: Path, workers: int) -> Epoch:
    import cv2
    import simplejpeg

    cv2.setNumThreads(1)

    def view(encoded: bytes) -> np.ndarray:
        pixels = simplejpeg.decode_jpeg(encoded, "RGB")
        left, top, width, height = random_box(pixels.shape[1], pixels.shape[0])
        crop = cv2.resize(
            pixels[top : top + height, left : left + width],
            (SIDE, SIDE),
            interpolation=cv2.INTER_LINEAR,
        )
        return np.ascontiguousarray(crop[:, ::-1]) if random.random() < 0.5 else crop

    return _webdataset(folder, workers, view)


def mosaicml_streaming(folder: Path, workers: int) -> Epoch:
    from streaming import StreamingDataset

    view = _pillow_view()

    class Images(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return view(sample["jpg"]), sample["cls"]

    return _loader_of(Images(local=str(folder / "mds"), shuffle=True, batch_size=BATCH), workers)


def litdata(folder: Path, workers: int) -> Epoch:
    from litdata import StreamingDataLoader, StreamingDataset

    view = _pillow_view()

    class Images(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return view(sample["jpg"]), sample["cls"]

    return _loader_of(Images(str(folder / "litdata"), shuffle=True), workers, StreamingDataLoader)


def dali(folder: Path, workers: int) -> Epoch:
    """DALI on the CPU, with decode and crop in one operator."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=workers, device_id=None)
    def make() -> Any:
        encoded, labels = fn.readers.file(
            file_root=str(folder / "images"), random_shuffle=True, name="files"
        )
        images = fn.decoders.image_random_crop(
            encoded, random_area=[MIN_AREA, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        images = fn.resize(
            images, size=[SIDE, SIDE], interp_type=types.INTERP_TRIANGULAR, antialias=True
        )
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    pipeline = make()
    pipeline.build()
    batches = math.ceil(pipeline.reader_meta("files")["epoch_size"] / BATCH)

    def epoch() -> Iterator[int]:
        for _ in range(batches):
            images, _ = pipeline.run()
            yield len(images.as_array())

    return epoch


def ffcv(folder: Path, workers: int) -> Epoch:
    """FFCV with its threads, and with JPEGs that it has encoded itself (quality 92)."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    decoder = RandomResizedCropRGBImageDecoder((SIDE, SIDE), scale=(MIN_AREA, 1.0))
    loader = Loader(
        str(folder / "images.beton"),
        batch_size=BATCH,
        num_workers=workers,
        order=OrderOption.QUASI_RANDOM,
        drop_last=False,
        os_cache=True,
        pipelines={
            "image": [decoder, RandomHorizontalFlip(), ToTensor()],
            "label": [IntDecoder(), ToTensor()],
        },
    )

    def epoch() -> Iterator[int]:
        for images, _ in loader:
            yield len(images)

    return epoch


LOADERS: dict[str, tuple[Callable[[Path, int], Epoch], str]] = {
    "ours": (ours, "trainer"),
    "ours, decode_crop only": (ours_decode_only, "trainer"),
    "torchvision ImageFolder": (imagefolder, "torchvision"),
    "webdataset, Pillow": (webdataset_pillow, "webdataset"),
    "webdataset, torchvision": (webdataset_torchvision, "webdataset"),
    "webdataset, simplejpeg, cv2": (webdataset_simplejpeg, "simplejpeg"),
    "mosaicml-streaming": (mosaicml_streaming, "streaming"),
    "litdata": (litdata, "litdata"),
    "DALI on the CPU": (dali, "nvidia.dali"),
    "FFCV": (ffcv, "ffcv"),
}
"""For each name, the function that creates the epoch factory, and the package that it needs."""


def read_image(item: tuple[str, int]) -> dict[str, Any]:
    """A sample as the formats of other libraries store it."""
    return {"jpg": Path(item[0]).read_bytes(), "cls": item[1]}


def prepare(name: str, folder: Path) -> None:
    """Write the images in the format of a loader, if it has one."""
    classes = sorted((folder / "images").iterdir())
    items = [
        (str(path), label)
        for label, directory in enumerate(classes)
        for path in sorted(directory.iterdir())
    ]
    random.Random(0).shuffle(items)
    if name == "mosaicml-streaming":
        from streaming import MDSWriter

        with MDSWriter(out=str(folder / "mds"), columns={"jpg": "bytes", "cls": "int"}) as writer:
            for item in items:
                writer.write(read_image(item))
    elif name == "litdata":
        from litdata import optimize

        optimize(
            read_image,
            items,
            str(folder / "litdata"),
            chunk_bytes="64MB",
            num_workers=1,
            verbose=False,
        )
    elif name == "FFCV":
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter
        from torchvision.datasets import ImageFolder

        fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=92), "label": IntField()}
        DatasetWriter(str(folder / "images.beton"), fields, num_workers=1).from_indexed_dataset(
            ImageFolder(folder / "images")
        )


def versions() -> str:
    """The versions of the installed packages, as JSON."""
    import importlib.metadata as metadata

    names = (
        "torch",
        "torchvision",
        "webdataset",
        "pillow",
        "simplejpeg",
        "opencv-python-headless",
        "litdata",
    )
    found = {}
    for name in (*names, "mosaicml-streaming", "nvidia-dali-cuda130", "ffcv"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return json.dumps(found)
