"""OpenFace over the clips of a shard folder: one csv of action units per record.

In: a shard folder and OpenFace 2.x's FeatureExtraction (one face) or FaceLandmarkVidMulti (all
faces). Out: FOLDER/KEY.csv, made from the clip that the shard holds, so that its frame numbers are
those of the record. An existing csv is kept, so a stopped run resumes. OpenFace is not part of this
project; its licence is academic and non-commercial.
"""

import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from data_shards.files import write_atomically
from data_shards.shards.index import ShardIndex
from data_shards.shards.reader import iter_records
from data_shards.shards.record import Record, Video

PROGRAMS: Final = {"single": "FeatureExtraction", "multi": "FaceLandmarkVidMulti"}
_LIMIT_S: Final = 600.0  # for one clip; OpenFace takes a few times the clip's length


def find_openface(program: str | None, faces: str) -> Path | None:
    """The named OpenFace program, else the one on the PATH; None if there is none.

    Raises FileNotFoundError if a named one does not exist.
    """
    path = shutil.which(program if program is not None else PROGRAMS[faces])
    if program is not None and path is None:
        raise FileNotFoundError(
            f"--openface: no program {program}; give the path of {PROGRAMS[faces]} of OpenFace 2.x"
        )
    return None if path is None else Path(path)


def records_of(shards: Path) -> Iterator[Record]:
    """All records of a shard folder, in order."""
    return iter_records(ShardIndex.load(shards))


def measure_records(
    shards: Path, csvs: Path, program: Path, *, progress: Callable[[int], None] | None = None
) -> Counter[str]:
    """Write a csv for every record with a video and an emotion that has none yet.

    A clip that OpenFace cannot read gets KEY.failed with OpenFace's output; remove the file to try
    the clip again.

    Returns:
        counts: 'measured', 'there' (from an earlier run), 'no-video' (extracted frames), 'failed'.
    """
    csvs.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    for done, record in enumerate(records_of(shards), start=1):
        if record.emotion is not None:
            counts[_measure(record, csvs, program)] += 1
        if progress is not None:
            progress(done)
    return counts


def _measure(record: Record, csvs: Path, program: Path) -> str:
    target, failed = csvs / f"{record.key}.csv", csvs / f"{record.key}.failed"
    if target.is_file():
        return "there"
    if failed.is_file():
        return "failed"
    if not isinstance(record.media, Video):
        return "no-video"
    with tempfile.TemporaryDirectory(dir=csvs, prefix=".openface-") as folder:
        clip = Path(folder) / "clip.mp4"
        clip.write_bytes(record.media.mp4)
        command = [str(program), "-f", str(clip), "-out_dir", folder, "-of", "clip", "-aus"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_LIMIT_S, check=False
            )
            output = f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
        except subprocess.TimeoutExpired:
            output = f"no answer in {_LIMIT_S:.0f} s"
        csv = Path(folder) / "clip.csv"
        if not csv.is_file():
            write_atomically(failed, output)
            return "failed"
        os.replace(csv, target)
    return "measured"
