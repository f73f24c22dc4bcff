"""Moves credentials from URLs to the environment variables that libraries read.

After that, no configuration, process argument, log line or file of a run can contain them. Called
at the start of every process and for every configuration that is read.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import yaml

from trainer.errors import UserError
from trainer.secrets.redaction import redact_credentials

URI_KEY = "tracking.uri"
_URI_VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
_SERVER = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
_DATABASE = ("PGUSER", "PGPASSWORD")
_POSTGRESQL = ("postgresql", "postgres")
_HOST = "CONVOY_CREDENTIALS_HOST"
"""Environment variable that names the server whose credentials were taken, so that they are not
sent to any other server.
"""
_REFUSED = "credentials do not belong in a URL or a recipe; set them in the environment"


def take_credentials(overrides: Sequence[str] = ()) -> list[str]:
    """Removes MLflow credentials from the environment's URIs and from ``overrides`` (key=value).

    Returns ``overrides`` without them. Raises UserError, without echoing a value, for credentials
    under another key.
    """
    for name in _URI_VARIABLES:
        if uri := os.environ.get(name):
            clean = take_from_uri(uri.strip(), name)
            if clean != uri:
                os.environ[name] = clean
    kept = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if key == URI_KEY and equals:
            bare = value.strip("'\" ")
            clean = take_from_uri(bare, URI_KEY)
            kept.append(override if clean == bare else f"{key}={clean}")
        elif redact_credentials(override) != override:
            raise UserError(f"{redact_credentials(key)}: {_REFUSED}")
        else:
            kept.append(override)
    return kept


def take_from_values(values: dict[str, Any]) -> None:
    """Removes the credentials of ``tracking.uri`` from a parsed recipe.

    Raises UserError for credentials under any other key.
    """
    tracking = values.get("tracking")
    if isinstance(tracking, dict) and isinstance(uri := tracking.get("uri"), str):
        tracking["uri"] = take_from_uri(uri.strip(), URI_KEY)
        _drop_foreign(tracking["uri"])
    faults = [
        f"{key}: {_REFUSED}"
        for key, value in _texts(values)
        if key != URI_KEY and redact_credentials(value) != value
    ]
    if faults:
        raise UserError(*faults)


def take_from_uri(uri: str, where: str) -> str:
    """Returns ``uri`` without credentials, after moving them to environment variables.

    These are the variables that MLflow (or PostgreSQL's client) reads. Raises UserError, which
    names ``where`` and does not echo the URI, if that is impossible.
    """
    scheme, separator, rest = uri.partition("://")
    end = min((rest.index(mark) for mark in "/?#" if mark in rest), default=len(rest))
    user_info, at, host = rest[:end].rpartition("@")
    user, colon, password = user_info.partition(":")
    clean = f"{scheme}{separator}{host}{rest[end:]}" if at else uri
    kind = scheme.lower().partition("+")[0] if separator else ""
    if redact_credentials(clean) != clean or _may_hold_password(clean, kind):
        names = _DATABASE if kind in _POSTGRESQL else _SERVER
        raise UserError(
            f"{where}: contains credentials that cannot be parsed; write "
            "http://USER:PASSWORD@HOST and percent-encode the special characters of both (@ is "
            f"%40, / is %2F, # is %23, ? is %3F), or set {' and '.join(names)}"
        )
    if not at:
        return uri
    if kind in ("http", "https"):
        names = _SERVER
    elif kind in _POSTGRESQL:
        names = _DATABASE
    elif not colon:
        return uri  # a user name alone is not a secret
    else:
        raise UserError(
            f"{where}: a password in a {kind}:// URI would appear in logs; use an MLflow "
            "server, or PostgreSQL"
        )
    if colon:
        os.environ[names[0]], os.environ[names[1]] = unquote(user), unquote(password)
        if names is _SERVER:
            os.environ[_HOST] = host.lower()
    else:
        os.environ[names[0]] = unquote(user)
    return clean


def _may_hold_password(uri: str, kind: str) -> bool:
    """Returns whether text that no parser accepts as credentials could still contain some.

    Examples are ``http://me:123/x@host`` and text without a scheme. Files may have any name.
    """
    if kind in ("sqlite", "file") or (uri.startswith(("/", ".")) and not uri.startswith("//")):
        return False
    if kind in ("http", "https"):
        return "@" in uri
    return not kind and ":" in uri.partition("@")[0] and "@" in uri


def without_credentials(recipe: str) -> str:
    """Returns the text of a recipe for a run's records, without credentials.

    Credentials that YAML escapes hide are redacted as well, at the cost of the layout.
    """
    text = redact_credentials(recipe)
    values = yaml.safe_load(text)
    if all(redact_credentials(value) == value for _, value in _texts(values)):
        return text
    return yaml.safe_dump(_redacted(values), sort_keys=False)


def refuse_credentials(texts: Mapping[str, str]) -> None:
    """Raises UserError that names the ``texts`` with credentials.

    Used for text that becomes part of a manifest.
    """
    faults = [
        f"{name}: contains credentials, which a manifest would show to everybody; put "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY) into the Secret named by --mlflow-secret (or "
        "--object-store-secret), and remove them from the URL"
        for name, text in texts.items()
        if redact_credentials(text) != text
    ]
    if faults:
        raise UserError(*faults)


def _redacted(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _redacted(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_redacted(value) for value in values]
    return redact_credentials(values) if isinstance(values, str) else values


def _drop_foreign(uri: str) -> None:
    """Discards credentials that were taken from the URI of a different server."""
    taken = os.environ.get(_HOST)
    scheme, _, rest = uri.partition("://")
    if taken and scheme.lower() in ("http", "https") and rest.partition("/")[0].lower() != taken:
        for name in (*_SERVER, _HOST):
            os.environ.pop(name, None)


def _texts(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields every string in nested mappings and lists, with its dotted key."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from _texts(value, key)
    elif isinstance(values, str):
        yield key, values
