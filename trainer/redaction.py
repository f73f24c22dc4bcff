"""Credentials in URLs, removed before anything is printed, logged or written."""

import re

_USER_INFO = re.compile(r"(?<=://)[^/\s?#]*@")


def redact_credentials(text: str) -> str:
    """``text`` without the user name and password of any URL in it."""
    return _USER_INFO.sub("", text)
