"""A model's own arrays, lent to a thread that writes them to files while training goes on."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping

import numpy as np

from ..cpu import memory
from ..formats.safetensors_file import Tensor

Key = tuple[str, str]  # a file and a tensor in it


class LentArrays:
    """Arrays that the writing thread reads one after another, in place, for as long as training does not change them.

    When training is about to change arrays in place, `copy_unread` copies those that have not been read yet, and the
    thread reads the copies. Where training is slower than the disk, nothing is ever copied.
    """

    def __init__(self, files: Mapping[str, Mapping[str, Tensor]], copies: dict[Key, np.ndarray]) -> None:
        """The tensors of each file, in the order in which they are written.

        `copies` keeps the memory of the copies from one checkpoint to the next: fresh memory takes ten times as long.
        """
        self._copies = copies
        self._unread = {(file, name): t.read() for file, tensors in files.items() for name, t in tensors.items()}
        self._unread_are_copies = False
        self._condition = threading.Condition()
        self._reading_original = False  # whether the thread holds an array of the model itself, and not a copy
        self.files = {
            file: {
                name: Tensor(t.dtype, t.shape, functools.partial(self._read, (file, name)))
                for name, t in tensors.items()
            }
            for file, tensors in files.items()
        }

    def _read(self, key: Key) -> np.ndarray:
        with self._condition:
            self._reading_original = not self._unread_are_copies
            return self._unread.pop(key)

    def finish_array(self, n_bytes: int = 0) -> None:
        """The thread has written the array that it read last. (The parameter is that of safetensors_file.write.)"""
        with self._condition:
            self._reading_original = False
            self._condition.notify()

    def finish(self) -> None:
        """The thread reads nothing more, because all is written or because writing failed."""
        with self._condition:
            self._unread.clear()
        self.finish_array()

    def copy_unread(self) -> None:
        """Returns when the thread reads none of the model's arrays any more: what is left is copied, and the array
        that is being written is waited for. A second call has nothing left to do."""
        with self._condition:
            if not self._unread_are_copies:
                for key, array in self._unread.items():
                    if key not in self._copies:
                        self._copies[key] = np.empty(array.shape, array.dtype)
                    memory.copy(array, self._copies[key])
                    self._unread[key] = self._copies[key]
                self._unread_are_copies = True
            self._condition.wait_for(lambda: not self._reading_original)
