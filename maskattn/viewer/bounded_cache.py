"""A bounded least-recently-used cache, in which concurrent requests for a value compute it only once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["BoundedCache"]

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """Values by key. The least recently used are dropped first; the newest value always stays.

    Args:
        most: largest total size of the values, in the units of ``size_of``.
        size_of: returns the size of a value.
        on_drop: called with each value that is dropped.
    """

    def __init__(
        self, most: int, size_of: Callable[[Value], int], on_drop: Callable[[Value], None] = lambda value: None
    ) -> None:
        self._most, self._size_of, self._on_drop = most, size_of, on_drop
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()
        self._making: dict[Hashable, threading.Lock] = {}

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return the value of a key, computing it with ``make`` if it is not cached."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._values:
                    return self._values[key]
            try:
                value = make()
                self._put(key, value)
            finally:
                with self._lock:
                    self._making.pop(key, None)
        return value

    def clear(self) -> None:
        """Drop all values."""
        with self._lock:
            values = list(self._values.values())
            self._values.clear()
            self._size = 0
        for value in values:
            self._on_drop(value)

    def _put(self, key: Hashable, value: Value) -> None:
        dropped = []
        with self._lock:
            self._values[key] = value
            self._size += self._size_of(value)
            while self._size > self._most and len(self._values) > 1:
                _, old = self._values.popitem(last=False)
                self._size -= self._size_of(old)
                dropped.append(old)
        for old in dropped:
            self._on_drop(old)
