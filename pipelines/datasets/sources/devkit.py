"""Reads ImageNet's devkit: ground truth of the validation images, and readable class names."""

import gzip
import io
import tarfile
import zlib
from pathlib import Path

from pipelines.datasets.class_names import synsets
from trainer.errors import UserError

FOLDERS = (".", "data", "ILSVRC2012_devkit_t12/data")
ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"


class Devkit:
    """The devkit in a source folder: a folder, its tar.gz, or loose files."""

    def __init__(self, root: Path) -> None:
        """Read the class ids and names. Raises UserError for corrupt files."""
        self._root = root
        self._by_number: dict[int, str] = {}
        self.words: dict[str, str] = {}
        self._is_alphabetical = False
        if (raw := self._find("meta.mat")) is not None:
            self._read_meta(raw)
        elif (raw := self._find("synset_words.txt")) is not None:
            self.words = synsets("synset_words.txt", raw)
            self._by_number = dict(enumerate(self.words, start=1))
            ids = list(self.words)
            # the well-known list of 1,000 is sorted by WordNet id, but the ground truth uses the
            # devkit's order
            self._is_alphabetical = len(ids) == 1000 and ids == sorted(ids)

    def ground_truth(self) -> list[str]:
        """Return the class of each validation image, in the order of the image names."""
        raw = self._find(TRUTH)
        if raw is None:
            raise UserError(
                f"{self._root}: val.tar needs the devkit: add {ARCHIVE}, or data/{TRUTH} from it"
            )
        if not self._by_number:
            raise UserError(
                f"{self._root}: needs the devkit's meta.mat (or a synset_words.txt in its "
                f"order) to read {TRUTH}"
            )
        if self._is_alphabetical:
            raise UserError(
                f"{self._root}/synset_words.txt: is in alphabetical order, but {TRUTH} uses "
                f"the devkit's order, which is in meta.mat; add {ARCHIVE}"
            )
        truth = []
        for number, line in enumerate(raw.split(), start=1):
            if not line.isdigit() or int(line) not in self._by_number:
                raise UserError(
                    f"{TRUTH}: line {number}: {line[:40]!r} is not one of the "
                    f"{len(self._by_number)} classes"
                )
            truth.append(self._by_number[int(line)])
        return truth

    def _read_meta(self, raw: bytes) -> None:
        from scipy.io import loadmat

        try:
            for synset in loadmat(io.BytesIO(raw), squeeze_me=True)["synsets"]:
                if synset["num_children"] == 0:
                    self._by_number[int(synset["ILSVRC2012_ID"])] = str(synset["WNID"])
                    self.words[str(synset["WNID"])] = str(synset["words"])
        except MemoryError:
            raise
        except Exception as error:  # SciPy's reader raises whatever exception its parsing causes
            raise UserError(
                f"{self._root}: meta.mat of the devkit cannot be read: {error}; extract it again"
            ) from None

    def _find(self, name: str) -> bytes | None:
        for folder in FOLDERS:
            path = self._root / folder / name
            if path.is_file():
                try:
                    return path.read_bytes()
                except OSError as error:
                    raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        packed = self._root / ARCHIVE
        if not packed.is_file():
            return None
        try:
            with tarfile.open(packed) as tar:
                members = [
                    member for member in tar if Path(member.name).name == name and member.isfile()
                ]
                file = tar.extractfile(members[0]) if members else None
                return file.read() if file else None
        except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, OSError) as error:
            raise UserError(f"{packed}: cannot be read: {error}; download it again") from None
