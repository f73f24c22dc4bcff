"""Removes credentials from text before it is printed, logged or written.

The first line of defense is that the configuration contains none (``trainer.secrets.credentials``).
This is the second one, for text produced by libraries: error messages, tracebacks, URLs.
"""

import os
import re
from base64 import b64encode
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"

_USER_INFO = re.compile(r"(?<=://)[^/\s?#\"'<>]*@")
# A password whose characters should have been percent-encoded: a colon not followed by a port.
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
# Any other value may be a word of ordinary text.
_SECRET_VALUE = re.compile(r"(?=.*[^a-z]).{6,}|.{16,}", re.DOTALL)


def redact_credentials(text: str) -> str:
    """Removes credentials from ``text``.

    Removes the user name and password from every URL, and hides the values of signing parameters
    and authorization headers. Text without credentials is returned unchanged.
    """
    text = _ODD_USER_INFO.sub("", _USER_INFO.sub("", text))
    for pattern in (_QUERY, _HEADER, _BEARER):
        text = pattern.sub(_hide, text)
    return text


def redact(text: str) -> str:
    """Removes credentials and the secret values of this process's environment from ``text``.

    Secrets are found as they are, percent-encoded or in base64. Used for everything that is
    printed.
    """
    text = redact_credentials(text)
    for secret in _secrets():
        if secret in text:
            text = text.replace(secret, HIDDEN)
    return text


def _hide(found: re.Match[str]) -> str:
    return found["name"] + HIDDEN


def _secrets() -> list[str]:
    """Returns the secret values, longest first.

    A value that contains another one is then removed completely.
    """
    values: set[str] = set()
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name.upper()):
            values.add(value)
        elif found := re.search(r"://[^/\s?#:]*:([^/\s?#]*)@", value):  # proxy variables
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
