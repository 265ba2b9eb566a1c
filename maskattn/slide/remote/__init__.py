"""Slides in object stores and on web servers: copied to a local cache when their turn comes, and removed afterwards.

:mod:`urls` says what a URL is and what it is called, :mod:`stores` opens it through fsspec, :mod:`files` looks it up,
:mod:`transfer` copies it, :mod:`cache` bounds the room that copies take, :mod:`fetch` does so in a thread, and
:mod:`copies` is what a run sees of all that. fsspec is imported when the first URL is met.
"""

from maskattn.slide.remote.cache import CacheSettings
from maskattn.slide.remote.copies import Copies
from maskattn.slide.remote.files import RemoteFile, locate
from maskattn.slide.remote.urls import is_url, path_of_url, shown_url

__all__ = ["CacheSettings", "Copies", "RemoteFile", "is_url", "locate", "path_of_url", "shown_url"]
