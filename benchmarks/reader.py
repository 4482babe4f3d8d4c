"""Cases of reading: every record once, and the first record at a place in the order.

Ours, and the peers that are here: webdataset, mosaicml-streaming, Megatron-Energon, all on the same
records. In: a shard folder. Out: functions for `peers.measure` and `stream.py`.
"""

import copy
import itertools
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import load

Case = Callable[[], int]
Start = Callable[[float], object]  # from nothing to the first record at a share of the epoch


def our_cases(folder: Path) -> dict[str, Case]:
    """Reading from the page cache, in order unless it says so."""
    import data_shards.shards.reader
    from data_shards.shards.index import ShardIndex
    from data_shards.shards.reader import ShardReader

    index = ShardIndex.load(folder)
    tars = [folder / shard.name for shard in index.shards]
    everything = [index.address(number) for number in range(index.num_records)]
    shuffled = random.Random(0).sample(everything, len(everything))
    spans = [
        (shard, int(index.entries(shard)[slot]["offset"]), int(index.entries(shard)[slot]["size"]))
        for shard, slot in everything
    ]
    reader = ShardReader(folder, index)
    files = [os.open(tar, os.O_RDONLY) for tar in tars]
    buffer = bytearray(2**20)

    def raw() -> int:
        for tar in tars:
            with tar.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return len(everything)

    def indexed() -> int:
        for shard, slot in everything:
            entry = index.entries(shard)[slot]
            reader.blocks(shard, int(entry["offset"]), int(entry["size"]))
        return len(everything)

    def by_zlib() -> int:
        fast, data_shards.shards.reader.crc32 = data_shards.shards.reader.crc32, zlib.crc32
        try:
            return sum(1 for address in everything if reader.members(*address))
        finally:
            data_shards.shards.reader.crc32 = fast

    return {
        "raw read, 1 MiB at a time": raw,
        "plain pread loop": pread_one_by_one(files, spans),
        "ours, indexed, no checksum": indexed,
        "ours, indexed, verified": lambda: sum(1 for a in everything if reader.members(*a)),
        "ours, indexed, verified by zlib's crc32": by_zlib,
        "ours, verified, shuffled": lambda: sum(1 for a in shuffled if reader.members(*a)),
        "ours, verified, every field checked": lambda: sum(
            1 for a in everything if reader.read(*a)
        ),
    }


def pread_one_by_one(files: list[int], spans: list[tuple[int, int, int]]) -> Case:
    """The least that reading record by record can cost: no index, no checks."""

    def run() -> int:
        for shard, offset, size in spans:
            os.pread(files[shard], size, offset)
        return len(spans)

    return run


class Peers:
    """The other loaders on the same records: cases, index sizes and starts, by name."""

    def __init__(self, folder: Path, work: Path, problems: dict[str, str]) -> None:
        self.cases: dict[str, Case] = {}
        self.index_bytes: dict[str, float] = {}  # per record
        self.starts: dict[str, Start] = {}
        self._folder, self._work = folder, work
        self._tars = sorted(folder.glob("*.tar"))
        for name, add in (
            ("webdataset", self._webdataset),
            ("streaming", self._streaming),
            ("megatron.energon", self._energon),
        ):
            module = load(name, problems)
            if module is None:
                continue
            try:
                add(module)
            except Exception as error:  # a peer that fails is a finding, not an end
                problems[name] = f"{type(error).__name__}: {str(error)[:200]}"

    def _webdataset(self, webdataset: Any) -> None:
        names = [str(tar) for tar in self._tars]

        def open_it() -> Any:
            return webdataset.WebDataset(names, shardshuffle=False, empty_check=False)

        def start(share: float) -> object:
            """It has no resume: what comes before is read and dropped."""
            from data_shards.shards.index import ShardIndex

            number = int(share * (ShardIndex.load(self._folder).num_records - 1))
            return next(itertools.islice(open_it(), number, None))

        self.cases["webdataset"] = lambda: sum(1 for _ in open_it())
        self.starts["webdataset, reads and drops what comes before"] = start

    def _streaming(self, streaming: Any) -> None:
        mds = self._work / "mds"
        write_mds(streaming, mds, self._folder)

        def open_it() -> Any:
            streaming.base.util.clean_stale_shared_memory()
            return streaming.StreamingDataset(local=str(mds), batch_size=1, shuffle=False)

        dataset = open_it()
        count = len(dataset)

        def start(share: float) -> object:
            restarted = open_it()
            number = int(share * (count - 1))
            restarted.load_state_dict(restarted.state_dict(number, from_beginning=True))
            return next(iter(restarted))

        self.cases["mosaicml-streaming"] = lambda: sum(1 for n in range(count) if dataset[n])
        self.index_bytes["mosaicml-streaming (index.json and shard headers)"] = (
            (mds / "index.json").stat().st_size + 4 * (count + 1)
        ) / count
        self.starts["mosaicml-streaming"] = start

    def _energon(self, energon: Any) -> None:
        folder = prepare_energon(self._work / "energon", self._tars)
        count = sum(1 for _ in open_energon(energon, folder))
        meta = sum(
            path.stat().st_size for path in (folder / ".nv-meta").rglob("*") if path.is_file()
        )
        states: dict[int, Any] = {}

        def start(share: float) -> object:
            number = int(share * (count - 1))
            loader = open_energon(energon, folder)
            if number:
                loader.restore_state_rank(copy.deepcopy(states[number]))  # it is worked in
            return next(iter(loader))

        for share in (0.01, 0.99):  # the states are taken beforehand, as a checkpoint would
            number = int(share * (count - 1))
            loader = open_energon(energon, folder)
            for _ in itertools.islice(loader, number):
                pass
            states[number] = loader.save_state_rank()
        self.cases["Megatron-Energon"] = lambda: sum(
            1 for _ in itertools.islice(open_energon(energon, folder), count)
        )
        self.index_bytes["Megatron-Energon (.nv-meta)"] = meta / count
        self.starts["Megatron-Energon"] = start


def write_mds(streaming: Any, out: Path, folder: Path) -> None:
    from data_shards.shards.reader import iter_plain

    with streaming.MDSWriter(out=str(out), columns={"json": "bytes", "mp4": "bytes"}) as writer:
        for _, members in iter_plain(folder):
            writer.write(members)


def prepare_energon(folder: Path, tars: list[Path]) -> Path:
    """The same tars with Energon's own index, by `energon prepare`."""
    folder.mkdir()
    for tar in tars:
        os.link(tar, folder / tar.name)
    command = Path(sys.executable).with_name("energon")
    arguments = ["prepare", str(folder), "--split-ratio", "1,0,0", "--non-interactive"]
    crude = ["--sample-type", "CrudeWebdataset"]
    done = subprocess.run(
        [str(command), *arguments, *crude], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"energon prepare: {(done.stderr or done.stdout).strip()[-160:]}")
    return folder


def open_energon(energon: Any, folder: Path) -> Any:
    """Its loader without workers, bytes as they are."""

    class Raw(energon.DefaultTaskEncoder):
        cookers = (energon.Cooker(energon.stateless(lambda sample: sample)),)
        decoder = None

        def encode_sample(self, sample: Any) -> Any:
            return sample

        def batch(self, samples: Any) -> Any:
            return samples

    return energon.get_savable_loader(
        energon.get_val_dataset(
            folder,
            split_part="train",
            worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
            batch_size=1,
            task_encoder=Raw(),
        )
    )
