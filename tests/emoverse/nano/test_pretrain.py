"""`emoverse pretrain`, tiny: the result loads, repeats bit for bit, and says what it can do."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_shards.world import pairs
from emoverse.config.schema import ConfigError, load_model
from emoverse.data.tokenizer import Tokenizer
from emoverse.models.architecture import load_architecture
from emoverse.models.internvl.checkpoint import build_native, import_checkpoint
from emoverse.nano import pretrain as pretrain_module
from emoverse.nano.gates import check_gates, constant_captions, exact_share, sign_f1
from emoverse.nano.pretrain import pretrain
from emoverse.nano.pretrain_config import Gates, PretrainConfig
from emoverse.nano.pretrain_data import encode_generic, pair_options, world_texts

pytestmark = pytest.mark.timeout(120)

NANO = Path(__file__).resolve().parents[3] / "configs" / "nano_pretrain.yaml"
MAX_TOKENS = 768
OPEN_GATES = {"probe_accuracy": 0.0, "caption_margin": -1.0, "dialogue_accuracy": 0.0, "samples": 3}
FILES = {
    "config.json",
    "model.safetensors",
    "tokenizer.model",
    "tokenizer_config.json",
    "provenance.json",
}


def tiny(out: Path, **changes: Any) -> PretrainConfig:
    phase = {"batch": 4, "lr": 1e-3, "warmup": 1}
    plain = {
        "seed": 3,
        "out": out,
        "processes": 1,
        "tokenizer_texts": 60,
        "vision": {"hidden": 32, "layers": 1, "heads": 2, "mlp": 48, "image_size": 112},
        "llm": {
            "family": "phi3",
            "hidden": 32,
            "layers": 1,
            "heads": 2,
            "mlp": 48,
            "vocab": 700,
            "max_positions": MAX_TOKENS,
        },
        "look": {**phase, "steps": 2},
        "basics": {**phase, "steps": 1},
        "align": {**phase, "steps": 3},
        "talk": {**phase, "steps": 2},
        "weight_decay": 0.02,
        "clip": 1.0,
        "gates": OPEN_GATES,
    }
    return PretrainConfig.model_validate(plain | changes)


@pytest.fixture(scope="module", autouse=True)
def quiet_environment() -> Iterator[None]:
    """What `pretrain` sets for its ranks must not stay for other tests.

    One thread for tiny tensors: on a busy machine two of them wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Provenances of a base by one process and of one by two; `folder` is where each stands."""
    top = tmp_path_factory.mktemp("bases")
    return {
        name: pretrain(tiny(top / name, processes=count)) | {"folder": top / name}
        for name, count in (("one", 1), ("two", 2))
    }


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_result_is_a_released_folder(name: str, made: dict[str, dict[str, Any]]) -> None:
    folder = made[name]["folder"]
    assert {path.name for path in folder.iterdir()} == FILES
    model, config_json = import_checkpoint(folder)
    assert config_json["template"] == "phi3-chat"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows == Tokenizer.load(folder).vocab_size == 700


def test_all_parts_are_trained(made: dict[str, dict[str, Any]]) -> None:
    trained, config_json = import_checkpoint(made["one"]["folder"])
    first = build_native(config_json, dtype=torch.bfloat16).state_dict()
    moved = {
        name
        for name, tensor in trained.state_dict().items()
        if not torch.equal(tensor, first[name])
    }
    for part in ("vision_tower", "multi_modal_projector", "language_model", "lm_head"):
        assert any(part in name for name in moved), part


def test_the_provenance_tells_how_to_repeat_it(
    made: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    one = dict(made["one"])
    folder = one.pop("folder")
    assert json.loads((folder / "provenance.json").read_text()) == one
    (tmp_path / "again.yaml").write_text(one["config"])
    assert load_model(PretrainConfig, [tmp_path / "again.yaml"]) == tiny(folder)
    gates = one["gates"]
    assert set(OPEN_GATES) - {"samples"} <= set(gates)
    assert gates["caption_margin"] == gates["caption_f1"] - gates["constant_caption_f1"]
    assert all(0 <= gates[name] <= 1 for name in gates if name != "caption_margin")
    assert one["versions"]["torch"] == torch.__version__


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"^out: \S+ is not empty; remove it or choose another"):
        pretrain(load_model(PretrainConfig, [NANO], [f"out={tmp_path}"]))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_missed_gate_ends_the_run_and_the_same_seed_gives_the_same_bytes(
    made: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = tmp_path / "again"
    gates = OPEN_GATES | {"caption_margin": 0.9, "dialogue_accuracy": 1.0}
    with pytest.raises(ValueError) as caught:
        pretrain(tiny(again, gates=gates))
    found = json.loads((again / "provenance.json").read_text())["gates"]
    assert str(caught.value) == (
        f"gates.caption_margin: must be at least 0.9, found {found['caption_margin']:.3f}; "
        "gates.dialogue_accuracy: must be at least 1.0, found 0.000; "
        "train longer (align.steps, talk.steps) or lower the gate"
    )
    one, two = made["one"]["folder"], made["two"]["folder"]
    for file in FILES - {"provenance.json"}:
        assert (again / file).read_bytes() == (one / file).read_bytes(), file
    # Two processes draw other pairs, with the same tokenizer.
    different = {file for file in FILES if (one / file).read_bytes() != (two / file).read_bytes()}
    assert different == {"model.safetensors", "provenance.json"}
    # Other gates are measured without training again.
    monkeypatch.setattr(pretrain_module, "_run_part", None)
    assert pretrain(tiny(again))["gates"] == found
    assert {path.name for path in again.iterdir()} == FILES


def test_a_killed_run_goes_on_after_its_first_part(
    made: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "killed"
    run_part = pretrain_module._run_part

    def die_in_the_second(config: PretrainConfig, part: str) -> tuple[float, list[float]]:
        if part == "talk":
            raise KeyboardInterrupt
        return run_part(config, part)

    monkeypatch.setattr(pretrain_module, "_run_part", die_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny(out))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"holds an unfinished run of another config"):
        pretrain(tiny(out, seed=4))
    pretrain(tiny(out))
    one = made["one"]["folder"]
    assert (out / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()
    assert {path.name for path in out.iterdir()} == FILES


def test_a_run_killed_before_it_notes_the_second_part_does_not_train_it_twice(
    made: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "killed"
    run_part = pretrain_module._run_part

    def die_after_the_second(config: PretrainConfig, part: str) -> tuple[float, list[float]]:
        found = run_part(config, part)
        if part == "talk":
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(pretrain_module, "_run_part", die_after_the_second)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny(out))
    monkeypatch.undo()
    pretrain(tiny(out))
    one = made["one"]["folder"]
    assert (out / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()
    assert {path.name for path in out.iterdir()} == FILES


def test_gates_that_are_met_say_nothing() -> None:
    figures = {"probe_accuracy": 0.8, "caption_margin": 0.2, "dialogue_accuracy": 0.9}
    check_gates(figures, Gates(**figures, samples=1))


def test_numbers_of_turns_are_counted_apart() -> None:
    asked = [
        pairs.GenericPair(kind="turns", question=f"1. Ann: Hi. {question}", answer=answer)
        for question, answer in (
            ("Which turn names the lie?", "the lie: 1."),
            ("Which turn names the wolf?", "the wolf: 1."),
            ("Who names the lie?", "the lie: Ann."),
        )
    ]
    written = ["the lie: 1.", "the wolf: 2.", "the lie: Ann."]
    assert exact_share(written, asked, number=True) == 0.5
    assert exact_share(written, asked, number=False) == 1.0


def test_sign_f1_counts_signs_not_words() -> None:
    asked = [
        pairs.GenericPair(kind="face", question="", answer="jaw open, thin lips."),
        pairs.GenericPair(kind="face", question="", answer="jaw open."),
    ]
    assert sign_f1(["thin lips, jaw open.", "jaw open."], asked) == 1.0
    assert sign_f1(["jaw open, eyes wide.", ""], asked) == pytest.approx(2 * 1 / (2 + 3))
    assert sign_f1(["", ""], asked) == 0.0
    assert constant_captions(asked) == ["jaw open.", "jaw open, thin lips."]


@pytest.mark.parametrize("kind", pairs.KINDS)
def test_pairs_become_examples(kind: str, made: dict[str, dict[str, Any]]) -> None:
    folder = made["one"]["folder"]
    tokenizer = Tokenizer.load(folder)
    options = pair_options(load_architecture(folder), "phi3-chat", max_tokens=MAX_TOKENS)
    for number in range(5):
        pair = pairs.draw_pair(np.random.default_rng(number), kind)
        full = encode_generic(pair, tokenizer, options, answer=True)
        asked = encode_generic(pair, tokenizer, options, answer=False)
        start = len(asked.ids_T)
        assert (full.ids_T[:start] == asked.ids_T).all()
        assert (full.labels_T[:start] == -100).all() and (asked.labels_T == -100).all()
        said = [token for token in full.labels_T[start:].tolist() if token >= 0]
        assert pair.answer in tokenizer.decode(said)
        frames = (full.ids_T == tokenizer.image_context_id).sum() / options.tokens_per_frame
        assert frames == full.num_frames == (0 if pair.frames is None else len(pair.frames))


def test_the_tokenizer_reads_every_kind_of_text() -> None:
    texts = list(world_texts(5, 30))
    assert texts == list(world_texts(5, 30)) != list(world_texts(6, 30))
    joined = "\n".join(texts)
    for part in ("jaw open", "Who speaks in turn", "The person says:", "Repeat the words:"):
        assert part in joined


def test_the_config_of_the_nano_base_loads() -> None:
    config = load_model(PretrainConfig, [NANO])
    assert config.gates.probe_accuracy >= 0.8
    assert config.vision.image_size == 112 and not config.out.is_absolute()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("align.batch=33", "align: found .*: batch must be a multiple of processes, which is 2"),
        ("vision.heads=3", "vision.heads: found 3: must divide hidden, which is"),
        ("llm.heads=7", "llm.heads: found 7: must divide hidden, which is"),
        ("vision.image_size=224", "found 224: must be 112, the size of the generic pairs"),
        ("gates.samples=0", "gates.samples: found 0: must be at least 1"),
        ("llm.familly=phi3", r"found 'phi3': unknown key \(did you mean 'family'\?\)"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(PretrainConfig, [NANO], [override])
