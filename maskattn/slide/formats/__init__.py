"""Formats: one file per decoder of slides, each with the interface of :mod:`maskattn.slide.formats.image`."""

from __future__ import annotations
