"""Object storage and folders as one thing: byte ranges in, whole objects out, retries with a bound, errors told in one line."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import obstore
from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, ObjectStore, from_url

from trainer.errors import ServiceLost, UserError

_RETRIES = {
    "max_retries": 8,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=3), "base": 2},
    "retry_timeout": timedelta(seconds=20),
}
_SCHEMES = ("s3://", "gs://", "az://", "file://")


class Store:
    """The objects below one URL."""

    def __init__(self, url: str, objects: ObjectStore) -> None:
        self.url = url.rstrip("/")
        self._objects = objects

    def read_small(self, name: str) -> bytes | None:
        """A whole object, or None where there is none. Raises UserError where the store cannot be read at all."""
        try:
            return obstore.get(self._objects, name).bytes().to_bytes()
        except (NotFoundError, FileNotFoundError):
            return None
        except (BaseError, OSError) as error:
            raise UserError(f"{self.url}/{name}: {self._reason(error)}") from None

    def read_ranges(self, name: str, starts: Sequence[int], ends: Sequence[int]) -> list[memoryview]:
        """The bytes ``[start, end)`` of an object, each pair. Raises ServiceLost after the retries."""
        try:
            parts = obstore.get_ranges(self._objects, name, starts=starts, ends=ends)
        except (BaseError, OSError) as error:
            raise ServiceLost(f"{self.url}/{name}: {self._reason(error)}") from None
        for part, start, end in zip(parts, starts, ends, strict=True):
            if len(part) != end - start:
                raise ServiceLost(f"{self.url}/{name}: bytes {start}-{end} were asked for, {len(part)} came")
        return [memoryview(part) for part in parts]

    def size(self, name: str) -> int | None:
        """Bytes of an object, or None where there is none."""
        try:
            return obstore.head(self._objects, name)["size"]
        except (NotFoundError, FileNotFoundError):
            return None
        except (BaseError, OSError) as error:
            raise UserError(f"{self.url}/{name}: {self._reason(error)}") from None

    def sizes(self) -> dict[str, int]:
        """Bytes of every object, by name."""
        try:
            return {meta["path"]: meta["size"] for batch in obstore.list(self._objects) for meta in batch}
        except (NotFoundError, FileNotFoundError):
            return {}
        except (BaseError, OSError) as error:
            raise UserError(f"{self.url}: {self._reason(error)}") from None

    def write(self, name: str, content: bytes | IO[bytes]) -> None:
        """Write a whole object; it appears at once or not at all."""
        try:
            obstore.put(self._objects, name, content)
        except (BaseError, OSError) as error:
            raise UserError(f"{self.url}/{name} cannot be written: {self._reason(error)}") from None

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """A file to write a large object into; it appears whole when the block ends, and not at all when that fails."""
        if not isinstance(self._objects, LocalStore):
            with tempfile.TemporaryFile() as file:
                yield file
                file.seek(0)
                self.write(name, file)
            return
        path = Path(str(self._objects.prefix)) / name
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                yield file
            part.replace(path)
        except OSError as error:
            raise UserError(f"{self.url}/{name} cannot be written: {error.strerror}") from None
        finally:
            part.unlink(missing_ok=True)

    def remove_empty_folder(self, name: str) -> None:
        """Object stores have no folders; on a disk they stay behind."""
        if isinstance(self._objects, LocalStore):
            with suppress(OSError):
                (Path(str(self._objects.prefix)) / name).rmdir()

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects; one that is not there is no error."""
        for name in names:
            try:
                obstore.delete(self._objects, name)
            except (NotFoundError, FileNotFoundError):
                pass
            except (BaseError, OSError) as error:
                raise UserError(f"{self.url}/{name} cannot be deleted: {self._reason(error)}") from None

    def _reason(self, error: BaseException) -> str:
        text = str(error)
        if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError) or "403" in text:
            return "permission denied; check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and the bucket's policy"
        if "NoSuchBucket" in text:
            return "there is no such bucket"
        if isinstance(error, NotFoundError | FileNotFoundError):
            return "not found"
        if "onnect" in text or "error sending request" in text or "dns" in text:
            return f"the object store at {endpoint() or 'its address'} cannot be reached (AWS_ENDPOINT_URL)"
        return " ".join(text.split("\n\nDebug source")[0].split())[:300]


def endpoint() -> str | None:
    """The S3 endpoint that the environment names."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def is_remote(url: str) -> bool:
    """Whether a URL names an object store, not a folder."""
    return "://" in url and not url.startswith("file://")


def open_store(url: str, create: bool = False) -> Store:
    """The store at ``s3://``, ``gs://``, ``az://``, ``file:///`` or a plain path. ``create`` makes a missing folder."""
    if not is_remote(url):
        path = Path(url.removeprefix("file://")).absolute()
        try:
            if path.exists() and not path.is_dir():
                raise UserError(f"{url}: is a file, but a folder is needed")
            if create:
                path.mkdir(parents=True, exist_ok=True)
            elif not path.is_dir():
                raise UserError(f"{url}: there is no such folder")
        except OSError as error:
            raise UserError(f"{url}: cannot be {'made' if create else 'read'}: {error.strerror}") from None
        return Store(url, LocalStore(str(path)))
    if not url.startswith(_SCHEMES):
        raise UserError(f"{url}: a URL begins with {', '.join(_SCHEMES)} or is a plain path")
    options: dict[str, Any] = {"retry_config": _RETRIES, "client_options": {"timeout": "60s", "connect_timeout": "5s"}}
    if url.startswith("s3://"):
        options["config"] = {"region": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"}
        if address := endpoint():
            options["config"]["endpoint"] = address
            if address.startswith("http://"):
                options["client_options"]["allow_http"] = True
    try:
        return Store(url, from_url(url, **options))
    except (BaseError, ValueError) as error:
        raise UserError(f"{url}: {str(error).splitlines()[0]}") from None
