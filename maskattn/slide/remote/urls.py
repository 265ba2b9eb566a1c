"""URLs as text: which strings are URLs, what their files are called, and how messages and records show them.

A query or a user name in a web address may be a credential, so neither is shown or recorded.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["host_of", "is_url", "is_web", "name_of_url", "path_of_url", "scheme_of", "shown_url"]

# A single letter is a drive of Windows.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(text: str | os.PathLike[str]) -> bool:
    """Return whether a text is a URL and not a path."""
    return isinstance(text, str) and _URL.match(text) is not None


def scheme_of(url: str) -> str:
    """Return the scheme in lower case: ``s3``, ``https``."""
    return url.partition("://")[0].lower()


def host_of(url: str) -> str:
    """Return what is between the scheme and the path: a server, or a bucket."""
    return url.partition("://")[2].partition("/")[0]


def is_web(url: str) -> bool:
    """Return whether a URL is a web address."""
    return scheme_of(url) in ("http", "https")


def shown_url(url: str) -> str:
    """Return the URL without its credentials."""
    if is_web(url):
        url = urlsplit(url)._replace(query="", fragment="").geturl()
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def path_of_url(url: str) -> Path:
    """Return a path that has the name of the URL's file, for ids and endings; there is no such file."""
    shown = shown_url(url)
    return Path(unquote(shown) if is_web(url) else shown)


def name_of_url(url: str) -> str:
    """Return the name of a URL's file, which is safe to create in a folder."""
    name = path_of_url(url).name.replace("\0", "")
    return "slide" if name in ("", "..") else name
