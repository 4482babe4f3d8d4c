"""`emoverse export`: what others load computes what was trained, and says where it comes from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import InternVLForConditionalGeneration

from emoverse.config.schema import Config
from emoverse.engine.distributed import World
from emoverse.evaluation.evaluate import find_state, load_state
from emoverse.export.layouts import compare, probe_logits
from emoverse.models.adapters import write_adapter
from emoverse.models.emoverse import EmoVerse, compose
from emoverse.models.internvl.checkpoint import import_checkpoint
from emoverse.training import shutdown
from emoverse.training.train import train_stages
from launch.cli import main

MakeConfig = Callable[..., Config]
ENDS = (".lora_A.default.weight", ".lora_B.default.weight")
CPU = torch.device("cpu")


@pytest.fixture
def trained(run_ranks: Callable[..., list[Any]], tiny_config: MakeConfig) -> MakeConfig:
    def make(*overrides: str, stages: tuple[str, ...] = ("stage1",)) -> Config:
        config = tiny_config(*overrides)

        def work(world: World) -> str:
            with shutdown.listen() as flag:
                return train_stages(config, stages, world, flag=flag)

        assert run_ranks(work, 1) == ["done"]
        return config

    return make


def export(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any]:
    """Exit code, and the JSON result or the text on stderr."""
    capsys.readouterr()
    code = main(["export", *map(str, words), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else err


def state_of(config: Config, which: str) -> EmoVerse:
    return load_state(config, find_state(config, which, config.run.run_dir, print), CPU)


def logits(model: EmoVerse) -> torch.Tensor:
    return probe_logits(model)


def test_every_layout_computes_what_was_trained(
    trained: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = trained()
    run_dir = config.run.run_dir
    state = state_of(config, "stage1")
    expected = logits(state)
    base, config_json = import_checkpoint(config.model.base)
    untrained = compare(expected, logits(compose(base, config_json, None, train="none")))
    assert untrained["relative_rms"] > 1e-2
    for layout in ("internvl2", "transformers", "adapter"):
        out = tmp_path / layout
        code, result = export(capsys, run_dir, "--layout", layout, "--out", out, "--dtype", "fp32")
        assert code == 0 and result["ok"], result
        assert result["check"]["relative_rms"] < 1e-5 and result["check"]["same_choice"] == 1.0
        if layout == "internvl2":
            native, _ = import_checkpoint(out)
        elif layout == "transformers":
            native = InternVLForConditionalGeneration.from_pretrained(out)
            assert native.generation_config.eos_token_id == [*native.generation_config.eos_token_id]
            half = InternVLForConditionalGeneration.from_pretrained(out, dtype=torch.bfloat16)
            assert half.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
        else:
            native, _ = import_checkpoint(config.model.base, torch.float32)
            PeftModel.from_pretrained(native, str(out), autocast_adapter_dtype=False)
        actual = logits(compose(native.eval(), config_json, None, train="none"))
        torch.testing.assert_close(actual, expected, atol=5e-5, rtol=0)


def test_the_stored_type_is_the_base_s_unless_asked(
    trained: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = trained()
    code, result = export(
        capsys, config.run.run_dir, "--layout", "internvl2", "--out", tmp_path / "out"
    )
    assert code == 0 and result["check"]["bound"] == 5e-2
    assert 0 < result["check"]["relative_rms"] < 5e-2
    written = load_file(tmp_path / "out" / "model.safetensors")
    stored = load_file(Path(config.model.base) / "model.safetensors")
    assert written.keys() == stored.keys()
    changed = set()
    for name, value in written.items():
        assert value.dtype == stored[name].dtype == torch.bfloat16
        if not torch.equal(value, stored[name]):
            changed.add(name)
    # Untrained tensors are the file's, bit for bit.
    assert changed and all(name.startswith(("language_model", "mlp1")) for name in changed)
    assert not any("norm" in name or "embed" in name or "lm_head" in name for name in changed)
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        left, right = (folder / name for folder in (tmp_path / "out", Path(config.model.base)))
        assert left.read_bytes() == right.read_bytes()


def test_the_card_tells_the_lineage(
    trained: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = trained("stages.stage2.adapter=merge", stages=("stage1", "stage2"))
    run_dir = config.run.run_dir
    code, result = export(
        capsys, run_dir, "--layout", "internvl2", "--out", tmp_path / "out", "--dtype", "fp32"
    )
    assert code == 0 and result["state"] == "tiny-stage2"
    assert result["check"]["relative_rms"] < 1e-5
    card = (tmp_path / "out" / "README.md").read_text()
    facts = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert [stage["stage"] for stage in facts["stages"]] == ["stage1", "stage2"]
    assert facts["stages"][1]["adapter"] == "merge"
    planned = json.loads((run_dir / "plan" / "plan.json").read_text())
    for words in (
        str(config.model.base),
        facts["base"]["fingerprint"],
        facts["stages"][0]["checkpoint"],
        planned["fingerprint"],
        "Not evaluated when it was exported",
        "msa=2/5 er=1/5 fer=2/5",
        "relative RMS difference",
    ):
        assert words in card, words
    # The adapter of stage 2 alone is nothing without the merged stage 1.
    code, message = export(capsys, run_dir, "--layout", "adapter", "--out", tmp_path / "two")
    assert code == 2 and "its adapter does not fit the released base" in message
    code, result = export(
        *(capsys, run_dir, "--layout", "adapter", "--which", "stage1"),
        *("--out", tmp_path / "one", "--no-check"),
    )
    assert code == 0 and "check" not in result
    earlier, *_, last = sorted((run_dir / "stage1" / "checkpoints").iterdir())
    metrics = {
        "checkpoint": f"stage1/checkpoints/{last.name}",
        "tasks": {"er": {"primary": "accuracy", "n": 7, "metrics": {"accuracy": {"value": 0.5}}}},
        "protocol": {"leakage": "paper", "decoding": "greedy"},
    }
    (run_dir / "eval" / "stage1").mkdir(parents=True)
    (run_dir / "eval" / "stage1" / "metrics.json").write_text(json.dumps(metrics))
    code, _ = export(
        *(capsys, run_dir, "--layout", "adapter", "--which", "stage1"),
        *("--out", tmp_path / "three", "--no-check"),
    )
    card = (tmp_path / "three" / "README.md").read_text()
    assert "| er | accuracy | 0.5000 | 7 |" in card and "leakage: paper" in card
    # Evaluated on its way, and then trained on.
    metrics["checkpoint"] = f"stage1/checkpoints/{earlier.name}"
    (run_dir / "eval" / "stage1" / "metrics.json").write_text(json.dumps(metrics))
    code, _ = export(
        *(capsys, run_dir, "--layout", "adapter", "--which", "stage1"),
        *("--out", tmp_path / "four", "--no-check"),
    )
    assert "Not evaluated when it was exported" in (tmp_path / "four" / "README.md").read_text()


def test_a_wrong_copy_is_a_fault(
    trained: MakeConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A merge that leaves out one layer ends with exit code 1."""
    from emoverse.export import layouts

    config = trained()
    right = layouts.merged

    def forgetful(name: str, value: torch.Tensor, adapters: Any) -> torch.Tensor:
        return value if "layers.1.mlp" in name else right(name, value, adapters)

    monkeypatch.setattr(layouts, "merged", forgetful)
    code, result = export(
        *(capsys, config.run.run_dir, "--layout", "internvl2"),
        *("--out", tmp_path / "out", "--dtype", "fp32"),
    )
    assert code == 1 and not result["ok"]


def test_wrong_input(
    trained: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = trained()
    run_dir, out = config.run.run_dir, tmp_path / "out"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    other = tmp_path / "other"
    shutil.copytree(config.model.base, other)
    table = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**table, "note": "changed"}))
    adapter, odd = tmp_path / "adapter", tmp_path / "odd"
    write_adapter(
        {f"model.language_model.layers.0.mlp.down_proj{end}": torch.ones(2, 2) for end in ENDS},
        adapter,
        r=2,
        alpha=4,
        base=str(config.model.base),
    )
    for name, text in (("torn", "["), ("list", "[1]"), ("mute", '{"r": 2, "lora_alpha": 4}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(text)
    unnamed = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": 5}
    (tmp_path / "unnamed").mkdir()
    (tmp_path / "unnamed" / "adapter_config.json").write_text(json.dumps(unnamed))
    shutil.copytree(config.model.base, odd)
    (odd / "tokenizer_config.json").write_text("[")
    cases = [
        ((adapter, "--out", out), "cannot be merged into model.language_model.layers.0.mlp"),
        ((adapter, "--out", out, "--base", tmp_path / "none"), "none/config.json does not exist"),
        ((tmp_path / "torn", "--out", out), "torn/adapter_config.json is not JSON"),
        ((tmp_path / "list", "--out", out), "list/adapter_config.json is not JSON"),
        ((tmp_path / "mute", "--out", out), "peft_type must be 'LORA', found None"),
        ((tmp_path / "unnamed", "--out", out), "does not name its base model"),
        ((run_dir, "--out", tmp_path / "full" / "x"), "is a file; choose a new folder"),
        ((run_dir, "--out", out, "--base", odd), "is not the base that stage1 was trained on"),
        ((run_dir, "--out", out, "--base", other), "is not the base that stage1 was trained on"),
        ((tmp_path / "full", "--out", out), "neither a run directory"),
        ((run_dir, "--out", tmp_path / "full"), "is not empty; choose a new folder"),
        ((run_dir, "--out", out, "--which", "stage9"), "no such stage; it has stage1, stage2"),
        ((run_dir, "--out", out, "--which", "stage2"), "holds no checkpoint"),
        ((run_dir, "--out", out, "--base", "internvl2-4b"), "a name that only `plan` can use"),
    ]
    for words, message in cases:
        code, output = export(capsys, *words, "--layout", "internvl2")
        assert code == 2 and message in output, output
        assert not out.exists()


def test_a_broken_export_leaves_nothing_under_its_name(
    trained: MakeConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The folder appears by one rename; what a dead export left beside it is cleared away."""
    from emoverse.export import layouts

    config = trained()
    out = tmp_path / "link"
    (tmp_path / "target").mkdir()
    out.symlink_to(tmp_path / "target")
    words = (capsys, config.run.run_dir, "--layout", "internvl2", "--out", out, "--no-check")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(layouts.ShardWriter, "close", full)
        code, output = export(*words)
    assert code != 0 and "No space left" in output
    assert not any((tmp_path / "target").iterdir())
    left = tmp_path / ".exporting-target"
    (left / "model-00007-of-00009.safetensors").touch()
    code, _ = export(*words)
    assert code == 0 and not left.exists() and out.is_symlink()
    names = {path.name for path in out.iterdir()}
    assert "model.safetensors" in names and "model-00007-of-00009.safetensors" not in names
