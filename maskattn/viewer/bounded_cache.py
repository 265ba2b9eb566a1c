"""The latest results that fit into so many bytes; what two threads ask for at once is made once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["BoundedCache"]

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """Values by key; the ones that were not asked for longest go first, the last made always stays.

    Args:
        most: of what ``size_of`` measures.
        size_of: the size of a value.
        on_drop: called with a value that goes.
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
        """The value of a key, made where it is not there."""
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
        """Let everything go."""
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
