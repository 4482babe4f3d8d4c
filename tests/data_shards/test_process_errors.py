"""Exceptions on their way from a worker process: kind, message and traceback survive."""

import pickle

import pytest

from data_shards.process_errors import WorkerError
from data_shards.shards.reader import DamagedRecord


class TwoArguments(Exception):
    """Pickles, and cannot be unpickled."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


class TwoValues(ValueError):
    """The same for a wrong value."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


DAMAGED = DamagedRecord(shard="shard-000000.tar", key="a", offset=512, cause="wrong checksum")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (KeyError("x"), KeyError, "'x'"),
        (DAMAGED, DamagedRecord, "record a in shard-000000.tar at byte 512: wrong checksum"),
        (TwoArguments(0, 1), RuntimeError, r"0 and 1 (TwoArguments could not be pickled: "),
        (TwoValues(0, 1), ValueError, r"0 and 1 (TwoValues could not be pickled: "),
    ],
)
def test_an_exception_crosses_processes(
    error: Exception, kind: type[Exception], message: str
) -> None:
    try:
        raise error
    except Exception as caught:
        sent = pickle.dumps(WorkerError.capture(caught, "In a worker"))
    with pytest.raises(kind) as raised:
        pickle.loads(sent).reraise()
    assert type(raised.value) is kind and str(raised.value).startswith(message)
    (note,) = raised.value.__notes__
    assert note.startswith("In a worker:\nTraceback") and "raise error" in note
