"""Credentials, removed before anything is printed, logged or written.

The first line of defence is that configuration holds none (``trainer.secrets.credentials``); this
is the second one, for texts that libraries make: error messages, tracebacks, URLs.
"""

import os
import re
from base64 import b64encode
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"

_USER_INFO = re.compile(r"(?<=://)[^/\s?#\"'<>]*@")
# A password with characters that should have been percent-encoded: a colon that no port follows.
_ODD_USER_INFO = re.compile(r"(?<=://)[^/\s@:\"'<>]*:(?!\d{1,5}(?:[/?#\s]|$))[^\s\"'<>]*@")
_QUERY = re.compile(
    r"(?i)(?P<name>(?<=[?&;#])(?:[a-z0-9_.~-]|%2D)*"
    r"(?:signature|token|password|passwd|secret|credential|api-?_?key|access-?_?key(?:-?_?id)?|sas|sig|pwd|pass|auth|key)"
    r"(?:[a-z0-9_.~-]|%2D)*=)(?P<value>[^&\s#\"'<>;]+)"
)
_HEADER = re.compile(
    r"(?i)(?P<name>\bauthorization[\"']?\s*[:=]\s*[b\"']*(?:basic|bearer|token|digest|negotiate|aws4-hmac-sha256)\s+)"
    r"(?P<value>[^\r\n\"']+)"
)
_BEARER = re.compile(
    r"(?P<name>\b(?:Bearer|Basic) )(?P<value>(?=[^\s\"']*[0-9=+/_])[A-Za-z0-9+/=._~-]{8,})"
)
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:PG)?(?:PASSWORD|PASSWD|SECRET|TOKEN|SECRET_ACCESS_KEY|ACCESS_KEY|ACCOUNT_KEY|SAS_KEY|API_KEY)$"
)
_SECRET_VALUE = re.compile(
    r"(?=.*[^a-z]).{6,}|.{16,}", re.DOTALL
)  # others are words of innocent text


def redact_credentials(text: str) -> str:
    """``text`` without the user name and password of any URL in it, and with the values of signing
    parameters and authorization headers hidden. Text without credentials is returned unchanged.
    """
    text = _ODD_USER_INFO.sub("", _USER_INFO.sub("", text))
    for pattern in (_QUERY, _HEADER, _BEARER):
        text = pattern.sub(_hide, text)
    return text


def redact(text: str) -> str:
    """The same, and without the secret values that this process's environment holds, as they are,
    percent-encoded or in base64. For everything that is printed.
    """
    text = redact_credentials(text)
    for secret in _secrets():
        if secret in text:
            text = text.replace(secret, HIDDEN)
    return text


def _hide(found: re.Match[str]) -> str:
    return found["name"] + HIDDEN


def _secrets() -> list[str]:
    """The longest first, so that one that contains another disappears entirely."""
    values: set[str] = set()
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name.upper()):
            values.add(value)
        elif found := re.search(r"://[^/\s?#:]*:([^/\s?#]*)@", value):  # proxies
            values |= {found[1], unquote(found[1])}
    secrets = {value for value in values if _SECRET_VALUE.fullmatch(value)}
    forms = (
        secrets
        | {quote(value, safe="") for value in secrets}
        | {quote_plus(value) for value in secrets}
    )
    encoded = {value.encode(errors="surrogateescape") for value in secrets}
    if password := os.environ.get("MLFLOW_TRACKING_PASSWORD"):
        encoded.add(
            f"{os.environ.get('MLFLOW_TRACKING_USERNAME', '')}:{password}".encode(
                errors="surrogateescape"
            )
        )
    return sorted(forms | {b64encode(value).decode() for value in encoded}, key=len, reverse=True)
