"""Shard folders on s3://, against a real S3 server in this process's machine (moto)."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from data_shards.shards import fetch
from data_shards.shards.index import ShardIndex
from data_shards.shards.open import CacheOptions, open_index
from data_shards.shards.reader import iter_records
from tests.builders import make_record, make_shards

pytestmark = pytest.mark.filterwarnings("ignore")  # of botocore, which warns of itself


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records = [make_record(f"clip_{index}") for index in range(6)]
    return make_shards(tmp_path / "shards", records, per_shard=2)


@pytest.fixture
def bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket that holds the folder; the address of the server comes from the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(fetch, "_PAUSE_S", 0.01)
    fetch._systems.clear()
    system = s3fs.S3FileSystem(skip_instance_cache=True)
    system.mkdir("clips")
    for path in folder.iterdir():
        system.put_file(str(path), f"clips/train/{path.name}")
    yield "s3://clips/train"
    fetch._systems.clear()
    server.stop()


def test_records_on_s3_are_those_of_the_folder(bucket: str, folder: Path, tmp_path: Path) -> None:
    options = CacheOptions(folder=tmp_path / "cache")
    index = open_index(bucket, options)
    expected = list(iter_records(ShardIndex.load(folder)))
    child = os.fork()  # data workers fork after the trainer has used s3
    if child == 0:
        os._exit(0 if list(iter_records(open_index(bucket, options))) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert list(iter_records(index)) == expected
    # What is cached needs no server; what is missing is said.
    shutil.rmtree(folder)
    assert list(iter_records(index)) == expected
    with pytest.raises(FileNotFoundError, match="check the address and the right to read it"):
        open_index("s3://clips/nothing", options)
