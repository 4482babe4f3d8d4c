"""Shared memory between one data worker and the trainer: allocated once, used again and again.

A ring has equal slots, one per step that the worker prepares ahead. The worker decodes the frames
of a step straight into a slot; the trainer's tensors are views of it. A slot is free again when the
last of these tensors is gone, whoever holds it. The memory has no name: nothing is left behind when
a process is killed. In front of the slots stands one line of text, what the worker is doing.
"""

import contextlib
import mmap
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

_HEAD: Final = 4096  # bytes for the line of text; a page, so that the slots begin on one
_ALIGN: Final = 64

Bytes = NDArray[np.uint8]


class SharedRing:
    """`slots` pieces of `slot_bytes` bytes that forked processes share.

    Memory is only taken when it is written for the first time.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        assert slots >= 1 and slot_bytes >= 0
        self.slots = slots
        self.slot_bytes = slot_bytes + -slot_bytes % mmap.PAGESIZE
        self._memory = mmap.mmap(-1, _HEAD + slots * self.slot_bytes)
        with contextlib.suppress(OSError):  # a kernel without them
            self._memory.madvise(mmap.MADV_HUGEPAGE)  # where the machine gives them to who asks
        self._bytes: Bytes = np.frombuffer(self._memory, dtype=np.uint8)
        self._address = int(self._bytes.__array_interface__["data"][0])

    def say(self, text: str) -> None:
        """Worker: what it is doing now."""
        line = text.encode("utf-8", errors="replace")[: _HEAD - 1]
        self._memory[: len(line) + 1] = line + b"\0"

    def said(self) -> str:
        """Trainer: what the worker said last."""
        return self._memory[:_HEAD].split(b"\0", 1)[0].decode("utf-8", errors="replace")

    def slot(self, number: int) -> Bytes:
        """The bytes of a slot."""
        start = _HEAD + number * self.slot_bytes
        return self._bytes[start : start + self.slot_bytes]

    def place(self, array: Bytes, slot: int) -> int | None:
        """Where in a slot an array lies, None if it lies elsewhere."""
        first = int(array.__array_interface__["data"][0]) - self._address
        offset = first - _HEAD - slot * self.slot_bytes
        return offset if offset >= 0 and offset + array.nbytes <= self.slot_bytes else None

    def lend(
        self, slot: int, spans: Sequence[tuple[int, int]], released: Callable[[int], object]
    ) -> list[Bytes]:
        """Trainer: views of some (offset, size) of a slot.

        `released(slot)` is called when the last of them, and of what was made of them, is gone.
        """
        start = self._address + _HEAD + slot * self.slot_bytes
        lease = _Lease(self)
        weakref.finalize(lease, released, slot)
        return [np.asarray(_View(lease, start + offset, size)) for offset, size in spans]

    def pin(self) -> bool:
        """Lock the pages for fast copies to the GPU, once; false where that is not possible."""
        if not torch.cuda.is_available():
            return False
        runtime: Any = torch.cuda.cudart()
        failed = int(runtime.cudaHostRegister(self._address, len(self._bytes), 0)) != 0
        if not failed:
            weakref.finalize(self, runtime.cudaHostUnregister, self._address)
        return not failed


class _Lease:
    """Lives as long as a slot is in use; keeps the memory itself alive, too."""

    __slots__ = ("__weakref__", "ring")

    def __init__(self, ring: SharedRing) -> None:
        self.ring = ring


class _View:
    """Memory as numpy's array interface; the array keeps this object, and this keeps the lease."""

    def __init__(self, lease: _Lease, address: int, size: int) -> None:
        self._lease = lease
        self.__array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class Desk:
    """Worker: one slot after the other, and where the next array goes in it."""

    def __init__(self, ring: SharedRing, free: Sequence[int]) -> None:
        self.ring = ring
        self.free = deque(free)
        self.slot: int | None = None
        self._used = 0

    def begin(self) -> None:
        """Take a slot for the next step; without a free one arrays get memory of their own."""
        self.slot = self.free.popleft() if self.free else None
        self.clear()

    def clear(self) -> None:
        """Begin the step once more: what was allocated for it is not needed."""
        self._used = 0

    def allocate(self, shape: tuple[int, ...]) -> Bytes:
        """uint8 memory of a shape: in the slot if it has room, else ordinary memory."""
        size = int(np.prod(shape))
        if self.slot is None or not size or self._used + size > self.ring.slot_bytes:
            return np.empty(shape, dtype=np.uint8)
        start = self._used
        self._used += size + -size % _ALIGN
        return self.ring.slot(self.slot)[start : start + size].reshape(shape)
