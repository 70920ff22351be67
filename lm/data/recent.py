"""A small thread-safe memory of the latest results of a pure function."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any


class Recent:
    """`function(*args)` with the last `size` results kept.

    Unlike `functools.lru_cache` it belongs to one object, and it pickles (empty), so that data objects can be sent to
    worker processes. The lock is held while computing: reader threads that need the same plan wait for one of them.
    """

    def __init__(self, function: Callable[..., Any], size: int) -> None:
        self._function, self._size = function, size
        self._kept: OrderedDict[tuple, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        with self._lock:
            if args not in self._kept:
                self._kept[args] = self._function(*args)
                if len(self._kept) > self._size:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(args)
            return self._kept[args]

    def __reduce__(self) -> tuple:
        return Recent, (self._function, self._size)
