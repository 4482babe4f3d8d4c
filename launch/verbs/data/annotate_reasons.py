"""`emoverse annotate reasons DIR`: why people feel as they do, from served models.

A vision model and a language model, for example InternVL2-8B and Llama-3.1-8B served by vLLM:
  emoverse annotate reasons data/meld --out reasons.jsonl
    --vision-url http://gpu1:8000/v1 --vision-model OpenGVLab/InternVL2-8B
    --text-url http://gpu2:8000/v1 --text-model meta-llama/Llama-3.1-8B-Instruct
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from data_shards.annotate.endpoint import Endpoint, Patience
from data_shards.annotate.reasons import ReasonOptions, annotate_reasons
from data_shards.jsonl import read_texts
from data_shards.progress import Progress
from data_shards.shards.index import ShardIndex
from launch.exit_codes import STOPPED
from launch.verb_tools import add_json, print_result, resumable

_SHOWN: Final = 10  # failed clips in the text; the JSON has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, the servers and models, and how often to try."""
    options, patience = ReasonOptions.__dataclass_fields__, Patience()
    add = parser.add_argument
    add("dir", type=Path, metavar="DIR", help="shard folder whose records get reasons")
    add("--out", type=Path, required=True, help="JSONL to write, for `build --reasons`")
    add("--cache", type=Path, help="file of answers so far (default: OUT.answers)")
    for role, work in (("vision", "describes the clip"), ("text", "infers the reason")):
        add(f"--{role}-url", default="", metavar="URL", help=f"base URL of the model that {work}")
        add(f"--{role}-model", default="", metavar="NAME", help="its name on that server")
        add(f"--{role}-key-env", default="", metavar="VAR", help="variable with its API key")
    add("--descriptions", type=Path, help='ready descriptions, JSONL of {"key", "description"}')
    add("--reasons", type=Path, help='ready reasons, JSONL of {"key", "reason"}')
    add("--frames", type=int, default=options["frames"].default, help="frames shown of a clip")
    add("--frame-size", type=int, default=options["size"].default, help="their side in pixels")
    add("--max-tokens", type=int, default=512, help="of an answer")
    add("--temperature", type=float, default=0.0, help="0 = the most likely answer (default)")
    add("--concurrency", type=int, default=options["concurrency"].default, help="clips at a time")
    add("--timeout", type=float, default=patience.timeout_s, help="seconds for one attempt")
    add("--attempts", type=int, default=patience.attempts, help="per question")
    add("--first-pause", type=float, default=patience.first_pause_s, help="seconds, then doubled")
    add("--limit", type=int, help="only the first records with an emotion")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Annotate and print the report; 75 if clips failed: the same command tries them again."""
    return resumable(
        "annotate reasons",
        lambda: print_result(annotate(args), args, report_text, not_ok=STOPPED),
    )


def annotate(args: argparse.Namespace) -> dict[str, Any]:
    """Annotate the records; the report names the clips that failed."""
    options = ReasonOptions(
        describe=_endpoint(args, "vision"),
        infer=_endpoint(args, "text"),
        patience=Patience(
            timeout_s=args.timeout, attempts=args.attempts, first_pause_s=args.first_pause
        ),
        frames=args.frames,
        size=args.frame_size,
        concurrency=args.concurrency,
        limit=args.limit,
        descriptions=read_texts(args.descriptions, "description") if args.descriptions else {},
        reasons=read_texts(args.reasons, "reason") if args.reasons else {},
    )
    records = ShardIndex.load(args.dir).num_records
    total = records if args.limit is None else min(args.limit, records)
    progress = Progress(total, "clips")
    return annotate_reasons(args.dir, args.out, options, cache=args.cache, progress=progress)


def _endpoint(args: argparse.Namespace, role: str) -> Endpoint | None:
    url, model = getattr(args, f"{role}_url"), getattr(args, f"{role}_model")
    if not url and not model:
        return None
    if not url or not model:
        missing = "url" if not url else "model"
        raise ValueError(f"annotate reasons: --{role}-{missing} must be given with the other one")
    return Endpoint(
        base_url=url,
        model=model,
        key_env=getattr(args, f"{role}_key_env"),
        max_tokens=args.max_tokens,
        temperature=args.temperature,
    )


def report_text(report: Mapping[str, Any]) -> str:
    """The failed clips, then the counts."""
    failed: Mapping[str, str] = report["failed"]
    lines = [f"{key}: {cause}" for key, cause in list(failed.items())[:_SHOWN]]
    if len(failed) > _SHOWN:
        lines.append(f"... and {len(failed) - _SHOWN} more")
    lines.append(
        f"{report['out']}: {report['reasons']} reasons for {report['records']} records "
        f"({report['without_emotion']} have no emotion), {report['asked']} questions asked, "
        f"{report['from_cache']} answers from earlier, {len(failed)} clips failed"
    )
    if report["unknown_keys"]:
        lines.append(f"{report['unknown_keys']} keys of the files are not in this dataset")
    if report["gave_up"]:
        lines.append("gave up: the server does not answer")
    if failed:
        lines.append("the same command asks again for what failed, and for nothing else")
    return "\n".join(lines)
