"""Shared memory between one data worker and the trainer, allocated once and reused for every step.

A buffer has equal slots, one per step that the worker prepares ahead. The worker decodes the frames
of a step straight into a slot; the trainer's tensors are views of it. A slot is free again when the
last of these tensors is garbage collected. The memory has no name in the file system, so a killed
process leaves nothing behind. The first page holds one line of text: what the worker is doing.
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

_HEADER_BYTES: Final = 4096  # for the line of text; a page, so that the slots are page-aligned
_ALIGNMENT: Final = 64  # bytes, of every array in a slot

Bytes = NDArray[np.uint8]


class SharedBuffer:
    """`num_slots` slots of `slot_bytes` bytes that forked processes share.

    The system allocates a page when it is first written.
    """

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        assert num_slots >= 1 and slot_bytes >= 0
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes + -slot_bytes % mmap.PAGESIZE
        self._memory = mmap.mmap(-1, _HEADER_BYTES + num_slots * self.slot_bytes)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes: Bytes = np.frombuffer(self._memory, dtype=np.uint8)
        self._address = int(self._bytes.__array_interface__["data"][0])

    def report(self, activity: str) -> None:
        """Worker: store a line about what it is doing now."""
        line = activity.encode("utf-8", errors="replace")[: _HEADER_BYTES - 1]
        self._memory[: len(line) + 1] = line + b"\0"

    def last_report(self) -> str:
        """Trainer: the last line that the worker stored."""
        return self._memory[:_HEADER_BYTES].split(b"\0", 1)[0].decode("utf-8", errors="replace")

    def slot(self, index: int) -> Bytes:
        """The bytes of a slot."""
        start = _HEADER_BYTES + index * self.slot_bytes
        return self._bytes[start : start + self.slot_bytes]

    def offset_in(self, slot: int, array: Bytes) -> int | None:
        """The byte offset of an array in a slot, None if it is not in that slot."""
        first = int(array.__array_interface__["data"][0]) - self._address
        offset = first - _HEADER_BYTES - slot * self.slot_bytes
        return offset if offset >= 0 and offset + array.nbytes <= self.slot_bytes else None

    def views(
        self, slot: int, spans: Sequence[tuple[int, int]], on_release: Callable[[int], object]
    ) -> list[Bytes]:
        """Trainer: views of some (offset, size) of a slot.

        `on_release(slot)` is called when the last view, and everything derived from it, is gone.
        """
        start = self._address + _HEADER_BYTES + slot * self.slot_bytes
        use = _SlotUse(self)
        weakref.finalize(use, on_release, slot)
        return [np.asarray(_View(use, start + offset, size)) for offset, size in spans]

    def pin(self) -> bool:
        """Page-lock the memory for fast copies to the GPU, once; False where impossible."""
        if not torch.cuda.is_available():
            return False
        runtime: Any = torch.cuda.cudart()
        failed = int(runtime.cudaHostRegister(self._address, len(self._bytes), 0)) != 0
        if not failed:
            weakref.finalize(self, runtime.cudaHostUnregister, self._address)
        return not failed


class _SlotUse:
    """Lives as long as a view of a slot exists, and keeps the buffer alive."""

    __slots__ = ("__weakref__", "buffer")

    def __init__(self, buffer: SharedBuffer) -> None:
        self.buffer = buffer


class _View:
    """Memory in numpy's array interface. The array refers to this object, and this to the use."""

    def __init__(self, use: _SlotUse, address: int, size: int) -> None:
        self._use = use
        self.__array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class SlotAllocator:
    """Worker: allocates the arrays of one step after the other in the slots of a buffer."""

    def __init__(self, buffer: SharedBuffer, free: Sequence[int]) -> None:
        self.buffer = buffer
        self.free = deque(free)  # slots
        self.slot: int | None = None
        self._used_bytes = 0

    def begin_step(self) -> None:
        """Take a free slot for the next step; if there is none, arrays get ordinary memory."""
        self.slot = self.free.popleft() if self.free else None
        self.reset()

    def reset(self) -> None:
        """Discard what was allocated for this step."""
        self._used_bytes = 0

    def allocate(self, shape: tuple[int, ...]) -> Bytes:
        """uint8 memory of a shape: in the slot if it has room, else ordinary memory."""
        size = int(np.prod(shape))
        if self.slot is None or not size or self._used_bytes + size > self.buffer.slot_bytes:
            return np.empty(shape, dtype=np.uint8)
        start = self._used_bytes
        self._used_bytes += size + -size % _ALIGNMENT
        return self.buffer.slot(self.slot)[start : start + size].reshape(shape)
