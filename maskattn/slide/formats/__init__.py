"""Decoders of slide formats, one file each, with the interface of :mod:`maskattn.slide.formats.image`."""

from __future__ import annotations
