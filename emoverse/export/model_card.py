"""The model card of an exported folder: README.md for people, lineage.json for programs.

In:  facts collected by the export. Out: two files. Metrics are included only where the run
directory holds them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOADING = {
    "internvl2": "The layout is that of the released InternVL2 models: same config file, same "
    "tensor names. ms-swift, lmdeploy, vLLM and the original code read it like the base, and "
    "`model.base` of an EmoVerse config may point to it.",
    "transformers": "`InternVLForConditionalGeneration.from_pretrained(FOLDER)` of transformers 5 "
    "reads the weights. Tokenise and prepare pixels with EmoVerse: transformers' own processors "
    "select other frames, resize differently and produce other token ids.",
    "adapter": "`PeftModel.from_pretrained(model, FOLDER)` adds it to the base model in "
    "transformers' layout.",
}


def write_card(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write README.md and lineage.json into an exported folder."""
    text = json.dumps(facts, indent=1, sort_keys=True, default=str) + "\n"
    (folder / "lineage.json").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(card_text(facts), encoding="utf-8")


def card_text(facts: Mapping[str, Any]) -> str:
    """The card as Markdown with the front matter that model hubs read."""
    lines = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text"]
    tags = ["sentiment-analysis", "emotion-recognition", "emoverse"]
    lines += [f"base_model: {facts['base']['name']}", "tags:", *(f"- {tag}" for tag in tags), "---"]
    lines += ["", f"# {facts['name']}", "", LOADING[facts["layout"]], "", "## Lineage", ""]
    lines += _table(("what", "value"), _lineage_rows(facts))
    if facts.get("stages"):
        columns = ("stage", "checkpoint", "starts from", "adapter", "learning rates", "rates")
        rows = [[str(stage[column]) for column in columns] for stage in facts["stages"]]
        lines += ["", "## Training", "", *_table(columns, rows)]
    lines += ["", "## Measured", ""]
    if facts.get("metrics"):
        lines += _table(("task", "metric", "value", "clips"), _metric_rows(facts["metrics"]))
        protocol = facts["metrics"]["protocol"]
        lines += ["", ", ".join(f"{key}: {value}" for key, value in sorted(protocol.items()))]
    else:
        lines.append("Not evaluated when it was exported.")
    if facts.get("check"):
        check = facts["check"]
        lines += [
            "",
            f"Logits of this folder against the base with unmerged adapters, one fixed sample, "
            f"{check['dtype']}: relative RMS difference {check['relative_rms']:.1e}, largest "
            f"{check['max_abs']:.1e}, the same next token at {check['same_choice']:.0%} of "
            f"{check['rows']} positions.",
        ]
    return "\n".join([*lines, ""])


def _lineage_rows(facts: Mapping[str, Any]) -> list[list[str]]:
    rows = [
        ["base", facts["base"]["name"]],
        ["base fingerprint (sha256)", facts["base"]["fingerprint"]],
        ["state", facts["state"]],
        ["stored as", facts["stored_as"]],
    ]
    for key in ("plan", "index"):
        if facts.get("data"):
            rows.append([f"{key} fingerprint", facts["data"].get(key, "-")])
    if facts.get("leakage"):
        rows.append(["leakage policy of the training shards", facts["leakage"]])
    rows += [[name, version] for name, version in facts["versions"].items()]
    return rows


def _metric_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for task, result in metrics["tasks"].items():
        value = result["metrics"][result["primary"]]["value"]
        shown = "-" if value is None else f"{value:.4f}"
        rows.append([task, result["primary"], shown, str(result["n"])])
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
