"""Exceptions that travel from a worker process to its parent.

In: an exception in the worker. Out: a picklable `WorkerError`; the parent raises it again with the
worker's traceback as a note. Both process pools use it: the builder's (`build/worker_pool.py`) and
the one of the training data.
"""

import pickle
import traceback
from dataclasses import dataclass
from typing import NoReturn, Self


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerError:
    """An exception of a worker process, with the traceback as text."""

    error: Exception
    traceback: str

    @classmethod
    def capture(cls, error: Exception, where: str) -> Self:
        """Prepare an exception that was just caught for pickling.

        An exception that cannot be pickled, or not be unpickled, is replaced by a ValueError (if it
        is one) or a RuntimeError with the same message.

        Args:
            where: heading of the traceback, such as 'In a worker process'.
        """
        text = f"{where}:\n{''.join(traceback.format_exception(error))}"
        return cls(error=_picklable(error), traceback=text)

    def reraise(self) -> NoReturn:
        """Raise the exception with the worker's traceback as a note."""
        self.error.add_note(self.traceback)
        raise self.error


def _picklable(error: Exception) -> Exception:
    try:
        copy = pickle.loads(pickle.dumps(error))  # a custom constructor may fail only on loading
    except Exception as reason:
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        return kind(f"{error} ({type(error).__name__} could not be pickled: {reason})")
    assert isinstance(copy, Exception)
    return copy
