"""A cache bounded by memory, for keys that strangers choose."""

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ByteCache(Generic[Key, Value]):
    """Keeps what was used last, within a number of bytes. Safe to use from several threads.

    Args:
        max_bytes: of all entries together, by the sizes that callers give.
        max_share: an entry larger than this share of `max_bytes` is not kept.

    Example:
        >>> cache = ByteCache(max_bytes=100, max_share=0.5)
        >>> cache.put("a", 1, 40), cache.put("b", 2, 40), cache.put("large", 3, 51)
        (None, None, None)
        >>> cache.get("a"), cache.put("c", 4, 40), cache.get("b"), cache.get("large")
        (1, None, None, None)
    """

    def __init__(self, max_bytes: int, max_share: float = 1 / 8) -> None:
        self.max_bytes = max_bytes
        self._max_entry = int(max_share * max_bytes)
        self._entries: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._n_bytes = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def n_bytes(self) -> int:
        """Memory of all entries, by the sizes that callers gave."""
        return self._n_bytes

    def get(self, key: Key) -> Value | None:
        """The value of a key, or None."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: Key, value: Value, n_bytes: int) -> None:
        """Keeps a value, and drops those that were not used for longest to make room for it."""
        if n_bytes > self._max_entry:
            return
        with self._lock:
            _, old = self._entries.pop(key, (None, 0))
            self._entries[key] = (value, n_bytes)
            self._n_bytes += n_bytes - old
            while self._n_bytes > self.max_bytes:
                _, (_, dropped) = self._entries.popitem(last=False)
                self._n_bytes -= dropped
