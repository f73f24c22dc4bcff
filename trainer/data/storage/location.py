"""Storage URLs: each denotes exactly one bucket and literal key prefix, or one folder.

Nothing in a URL is decoded, normalized or dropped: ``#``, ``?``, ``%`` and spaces are characters of
the key like any other. URLs that another tool would interpret differently are rejected.
"""

import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from trainer.data.storage.object_store import STORES
from trainer.errors import UserError
from trainer.secrets.redaction import redact_credentials

_ALIASES = {
    **dict.fromkeys(("s3a", "s3n", "s3fs", "minio", "aws", "oss"), "s3"),
    **dict.fromkeys(("gcs", "gcp"), "gs"),
    **dict.fromkeys(("azure", "abfs", "abfss", "adl", "wasb", "wasbs"), "az"),
}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_CONTAINER = re.compile(r"\$?[A-Za-z0-9][A-Za-z0-9-]{0,62}")
_BUCKETS = {"s3": _BUCKET, "gs": _BUCKET, "az": _CONTAINER}
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}(:\d{1,5})?")
_ADDRESS = re.compile(r"[0-9.]+")
_PORT = re.compile(r"(?P<host>[A-Za-z0-9._-]+):\d+")
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")
_MEANT_REMOTE = re.compile(rf"\s*({'|'.join((*STORES, *_ALIASES, 'https?'))}):", re.IGNORECASE)


@dataclass(frozen=True)
class Location:
    """A bucket and key prefix, or a local folder.

    ``bucket``: the container on Azure, HOST or HOST:PORT of other services; empty for a folder.
    ``prefix``: literal keys begin with it and a slash; empty for the full bucket; for a folder, its
    absolute path.
    """

    scheme: str
    bucket: str
    prefix: str

    @property
    def is_remote(self) -> bool:
        return self.scheme != "file"

    @property
    def root(self) -> str:
        """The bucket's URL."""
        return f"{self.scheme}://{self.bucket}"

    @property
    def url(self) -> str:
        """The canonical URL; ``parse_storage_url`` returns the same location for it."""
        if not self.is_remote:
            return self.prefix
        return f"{self.root}/{self.prefix}" if self.prefix else self.root

    def contains(self, other: "Location") -> bool:
        """Whether ``other`` is this location or below it; folders' symbolic links are resolved."""
        if (self.scheme, self.bucket) != (other.scheme, other.bucket):
            return False
        ours, theirs = (
            place.prefix if place.is_remote else os.path.realpath(place.prefix).lstrip("/")
            for place in (self, other)
        )
        return not ours or theirs == ours or theirs.startswith(f"{ours}/")


def parse_storage_url(url: str) -> Location:
    """Parses ``s3://``, ``gs://``, ``az://``, ``file:///`` or a plain path to a location.

    In a plain path, ``~`` is the home folder. Schemes are case-insensitive; one trailing slash is
    ignored. Raises UserError, whose message never shows credentials that the URL contains.
    """
    shown = _shown(url)
    if not url:
        raise UserError("an empty storage URL; give s3://BUCKET/PREFIX or a folder")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in url):
        raise UserError(f"{shown}: holds a control character or bytes that are not UTF-8")
    if redact_credentials(url) != url:
        if (named := _SCHEME.match(url)) and _ALIASES.get(named[1].lower()) == "az":
            raise UserError(f"{shown}: {named[1]}:// is not supported; write az://CONTAINER/PREFIX")
        raise UserError(
            f"{shown}: credentials do not belong in a URL; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY (or the variables of your store)"
        )
    if url != url.strip() and _MEANT_REMOTE.match(url):
        raise UserError(f"{shown!r}: remove the space before or after the URL")
    found = _SCHEME.match(url)
    scheme = found[1].lower() if found else ""
    if found is None or (found[2] is None and not _MEANT_REMOTE.match(url)):
        return _folder(url, url, shown)
    if found[2] is None:
        raise UserError(
            f"{shown}: write {_ALIASES.get(scheme, scheme)}:// with two slashes, or ./{shown} "
            "for a folder"
        )
    rest = url[found.end() :]
    if scheme == "file":
        return _file_url(rest, shown)
    if scheme not in STORES:
        raise UserError(f"{shown}: {_advice(scheme, rest)}")
    return _remote(scheme, rest, shown)


def is_remote(url: str) -> bool:
    """Whether a URL denotes an object store rather than a folder. Raises UserError."""
    return parse_storage_url(url).is_remote


def local_path(url: str) -> Path:
    """Returns the folder or file that a plain path or a file URL denotes.

    It need not exist. Raises UserError.
    """
    location = parse_storage_url(url)
    assert not location.is_remote, "callers check is_remote first"
    return Path(location.prefix)


def _shown(url: str) -> str:
    """Returns ``url`` for a message: on one line, without credentials."""
    text = redact_credentials(url)
    authority = re.match(r"\s*[A-Za-z][A-Za-z0-9+.-]*:/*([^/\s]*)", text)
    if authority and ":" in authority[1] and not _PORT.fullmatch(authority[1]):
        text = text[: authority.start(1)] + "..."  # possibly KEY:SECRET without a bucket
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        text = ascii(text)
    return text


def _advice(scheme: str, rest: str) -> str:
    if scheme in _ALIASES:
        meant = _ALIASES[scheme]
        name = "CONTAINER" if meant == "az" else "BUCKET"
        return f"{scheme}:// is not supported; write {meant}://{name}/PREFIX"
    if scheme in ("http", "https") and (host := rest.partition("/")[0]).endswith("amazonaws.com"):
        first, _, path = rest.partition("/")[2].partition("/")
        bucket = re.split(r"\.s3[.-]", host)[0] if ".s3" in host else first
        key = rest.partition("/")[2] if ".s3" in host else path
        return f"a web address; write s3://{bucket}/{key}".rstrip("/")
    if scheme in ("http", "https"):
        return (
            "a web address; write s3://BUCKET/PREFIX and set AWS_ENDPOINT_URL to the address of "
            "the store"
        )
    known = ", ".join(f"{name}://" for name in STORES)
    return f"{scheme}:// is not supported; a URL begins with {known} or is a plain path"


def _remote(scheme: str, rest: str, shown: str) -> Location:
    bucket, _, key = rest.partition("/")
    if scheme in _BUCKETS:
        _check_bucket(scheme, bucket, shown)
    elif not _HOST.fullmatch(bucket):
        raise UserError(f"{shown}: names no host; write {scheme}://HOST/PREFIX or HOST:PORT/PREFIX")
    if "\\" in key:
        raise UserError(f"{shown}: separate with /, not with \\")
    key = key.removesuffix("/")
    segments = key.split("/") if key else []
    if "" in segments:
        raise UserError(
            f"{shown}: holds an empty segment (//), which is a different key for the store; "
            "remove a slash"
        )
    if any(segment in (".", "..") for segment in segments):
        raise UserError(f"{shown}: an object store has no . and .. segments; write the key itself")
    if len(key.encode()) > 1024:
        raise UserError(f"{shown[:200]}...: longer than the 1024 bytes that a key can have")
    return Location(scheme, bucket, key)


def _check_bucket(scheme: str, bucket: str, shown: str) -> None:
    if not bucket:
        raise UserError(f"{shown}: names no bucket; write {scheme}://BUCKET/PREFIX")
    if port := _PORT.fullmatch(bucket):
        raise UserError(
            f"{shown}: a bucket has no port; write {scheme}://BUCKET/PREFIX and set "
            f"AWS_ENDPOINT_URL to http://{port[0]}"
        )
    if not _BUCKETS[scheme].fullmatch(bucket) or _ADDRESS.fullmatch(bucket):
        what = "container" if scheme == "az" else "bucket"
        raise UserError(
            f"{shown}: not a {what} name: letters, digits, dots and dashes; write {scheme}://{what.upper()}/PREFIX"
        )


def _file_url(rest: str, shown: str) -> Location:
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise UserError(f"{shown}: write file:///PATH with three slashes, or a plain path")
    if _ESCAPE.search(path):
        raise UserError(
            f"{shown}: %XX in a file URL is ambiguous; give the folder as a plain path, where % "
            "is a character"
        )
    return _folder(f"/{path}", rest, shown)


def _folder(path: str, url: str, shown: str) -> Location:
    if re.match(r"[A-Za-z]:[\\/]", url) or url.startswith("\\\\"):
        raise UserError(f"{shown}: a Windows path; write ./{shown} if a folder has that name")
    try:
        expanded = Path(path).expanduser() if path.startswith("~") else Path(path)
    except RuntimeError:
        raise UserError(
            f"{shown}: there is no such user; write ./{shown} if a folder has that name"
        ) from None
    return Location("file", "", str(expanded.absolute()))
