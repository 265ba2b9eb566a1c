"""Object stores and web servers, opened through fsspec, and their errors in words.

Credentials and endpoints are fsspec's own business: environment variables, and the files in ``~/.config/fsspec``.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

from maskattn.errors import SlideError
from maskattn.slide.names import as_text
from maskattn.slide.remote.urls import host_of, is_web, scheme_of, shown_url

__all__ = ["SILENT_S", "StoreError", "open_at", "store_errors", "store_of"]

SILENT_S = 60.0
"""Seconds without a byte after which a transfer has stalled."""

_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
}
_FORBIDDEN = (401, 403)
_NO_SUCH = (404, 410)


class StoreError(SlideError):
    """A store does not give what it was asked for; ``passing`` says whether asking again may help."""

    def __init__(self, message: str, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


def store_of(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, as fsspec has it, and the URL's path there.

    Raises:
        StoreError: a package is missing, or there is no such scheme.
    """
    scheme = scheme_of(url)
    try:
        import fsspec
    except ImportError as error:
        raise StoreError(
            f"a URL is read by fsspec, got {shown_url(url)} where it is not installed; "
            "pip install 'maskattn[remote]'" + (f" {_PACKAGES[scheme]}" if scheme in _PACKAGES else "")
        ) from error
    if scheme not in fsspec.available_protocols():
        raise StoreError(f"a URL must begin with a scheme that fsspec knows, got {shown_url(url)}; use s3, gs or https")
    with store_errors(url):
        store = _store(scheme, host_of(url), os.getpid())
        return store, store._strip_protocol(url)


@functools.lru_cache(maxsize=32)
def _store(scheme: str, host: str, process: int) -> Any:
    """One file system for each host, whichever thread asks: fsspec's own cache has one, and connections, per thread.

    A fork cannot use its parent's.
    """
    import fsspec

    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        import aiohttp
        from fsspec.config import conf

        # By default a transfer of more than five minutes is broken off.
        limits = aiohttp.ClientTimeout(total=None, sock_connect=SILENT_S, sock_read=SILENT_S)
        options["client_kwargs"] = {"timeout": limits}
        for name in ("http", "https"):
            options["client_kwargs"] |= conf.get(name, {}).get("client_kwargs", {})
    return fsspec.core.url_to_fs(f"{scheme}://{host}/", **options)[0]


def open_at(url: str, size: int | None, offset: int, block_bytes: int) -> tuple[Any, int]:
    """Open a URL for reading from an offset, or from 0 if it has to be read from its beginning.

    Args:
        url: of the file.
        size: of the file; None where it is not known.
        offset: where to begin.
        block_bytes: how much is read at a time.

    Returns:
        The file, and where it begins.
    """
    store, path = store_of(url)
    if not is_web(url):
        file = store.open(path, "rb", block_size=block_bytes, cache_type="none")
        file.seek(offset)
        return file, offset
    headers = dict(store.kwargs.get("headers", {})) | {"Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    # A size spares fsspec a question; what it is makes no difference.
    file = store.open(path, "rb", block_size=0, size=size or 1, headers=headers)
    return file, offset if file.r.status == 206 else 0


@contextlib.contextmanager
def store_errors(url: str) -> Iterator[None]:
    """Turn whatever a store raises into a :class:`StoreError`."""
    shown = as_text(shown_url(url))
    try:
        yield
    except SlideError:
        raise
    except ImportError as error:
        package = _PACKAGES.get(scheme_of(url), "the package that fsspec's own message names")
        raise StoreError(
            f"{scheme_of(url)}:// is read by a package of its own, got {shown} without it ({error}); "
            f"pip install {package}"
        ) from error
    except Exception as error:
        # Of a web address fsspec says that it does not exist, whatever the reason, which is the cause.
        if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        status, kind = getattr(error, "status", None), type(error).__name__
        if isinstance(error, FileNotFoundError) or status in _NO_SUCH:
            raise StoreError(
                f"a URL must lead to a file or a folder, got {shown}, which does not exist; check it"
            ) from error
        if isinstance(error, PermissionError) or status in _FORBIDDEN or "Credentials" in kind:
            raise StoreError(
                f"a URL must be one that this user may read, got {shown} ({kind}); give credentials as fsspec "
                "takes them: environment variables, or a file in ~/.config/fsspec"
            ) from error
        why = " ".join(as_text(str(error)).replace(as_text(url), shown).split())[:300]
        raise StoreError(
            f"a URL must answer, got {shown}: {kind}{f': {why}' if why else ''}; check the network and the address",
            passing=True,
        ) from error
