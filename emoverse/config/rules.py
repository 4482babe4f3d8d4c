"""Rules of the config that look at several fields at once.

In: the merged tree, valid or not. The field checks report a field that is missing or of the wrong
type, so a rule that requires it reports nothing. Out: the problems; `schema.load_config` joins them
with those of the fields, so that a user sees everything in one report. No torch.
"""

from collections.abc import Iterator

from emoverse.config.deepspeed_settings import offload_refusal, precision_refusal
from emoverse.config.errors import Problem, did_you_mean, show
from emoverse.config.yaml_source import Node

# Folders of the run directory beside those of the stages, some of which are removed at every start,
# and the name of the untrained model.
RESERVED = ("base", "plan", "eval", "cache", "faults", "jobs", "lease", "wandb")


def cross_field_problems(tree: Node) -> list[Problem]:
    """All violations of the rules below, in the order of the config."""
    rules = (_model_rules, _data_rules, _stage_rules, _train_rules, _evaluation_rules)
    return [problem for rule in rules for problem in rule(tree)]


def _model_rules(tree: Node) -> Iterator[Problem]:
    attention = _text(tree, "model", "attention")
    precision = _text(tree, "model", "precision")
    if attention in ("flash", "torch") and precision == "fp32":
        rule = (
            f"{attention} attention has no fp32; set model.precision to bf16 or attention to sdpa"
        )
        yield _problem(tree, ("model", "attention"), rule)
    preset = _text(tree, "model", "lora", "preset") or "paper"
    targets = _names(tree, "model", "lora", "targets")
    projector = _text(tree, "model", "projector") or "full"
    if preset == "authors" and projector != "lora":
        rule = (
            f"this preset puts adapters on the projector; set model.projector ({projector}) to lora"
        )
        yield _problem(tree, ("model", "lora", "preset"), rule)
    if preset == "custom" and not targets:
        rule = "the preset custom needs model.lora.targets, a list of layer names"
        yield _problem(tree, ("model", "lora", "preset"), rule)
    if preset in ("paper", "authors") and targets:
        rule = f"targets are for the preset custom, but the preset is {preset}; change one of them"
        yield _problem(tree, ("model", "lora", "targets"), rule)


def _data_rules(tree: Node) -> Iterator[Problem]:
    workers = _number(tree, 2, "data", "workers")
    if _value(tree, "model", "cache_features") is True and workers:
        rule = f"features are cached where the model is: set data.workers ({workers}) to 0"
        yield _problem(tree, ("model", "cache_features"), rule)
    tiles = _number(tree, 1, "data", "peak_tiles")
    if _value(tree, "model", "cache_features") is True and tiles is not None and tiles > 1:
        rule = f"cached features have one frame per peak: set data.peak_tiles ({tiles}) to 1"
        yield _problem(tree, ("model", "cache_features"), rule)
    most = _number(tree, 4096, "data", "max_tokens")
    pack = _number(tree, 4096, "data", "pack_tokens")
    if most is not None and pack is not None and pack < most:
        rule = (
            f"a pack must hold the longest sample, data.max_tokens = {most}; raise it or lower that"
        )
        yield _problem(tree, ("data", "pack_tokens"), rule)


def _stage_rules(tree: Node) -> Iterator[Problem]:
    stages = tree.nearest(["stages"]).value
    if not isinstance(stages, dict) or "stages" not in _mapping(tree):
        return
    earlier: list[str] = []
    for name, stage in stages.items():
        if name in RESERVED:
            rule = f"this name is taken in the run directory ({', '.join(RESERVED)}); rename it"
            yield Problem(place=stage.place, path=("stages", name), found=name, rule=rule)
        yield from _pool_rules(tree, name, earlier)
        start = _text(tree, "stages", name, "start_from")
        if start is not None and start not in ("base", *earlier):
            allowed = ["base", *earlier]
            rule = f"must be {_listing(allowed)}{_near(start, allowed, name, list(stages))}"
            yield _problem(tree, ("stages", name, "start_from"), rule)
        merges = _text(tree, "stages", name, "adapter") == "merge"
        if merges and start in (None, "base"):
            rule = "the base has no adapters to merge; name the earlier stage in start_from"
            yield _problem(tree, ("stages", name, "adapter"), rule)
        if _text(tree, "stages", name, "optimizer") == "continue":
            if start in (None, "base"):
                rule = "only an earlier stage hands moments over; name it in start_from"
                yield _problem(tree, ("stages", name, "optimizer"), rule)
            elif merges:
                rule = "moments belong to adapters that are merged away; set one of both otherwise"
                yield _problem(tree, ("stages", name, "optimizer"), rule)
        earlier.append(name)


def _pool_rules(tree: Node, name: str, earlier: list[str]) -> Iterator[Problem]:
    path = ("stages", name, "pool")
    pool = _value(tree, *path)
    if not isinstance(pool, dict):
        return
    given = [
        key for key in ("take", "rest_of") if key in pool and pool[key].value not in (None, [])
    ]
    if len(given) == 2:
        rule = "a pool has either take or rest_of, not both; set the other to null"
        yield _problem(tree, path, rule)
    if not given:
        rule = "a pool needs take: NUMBER, or rest_of: STAGE for the records that STAGE leaves"
        yield _problem(tree, path, rule)
    others = _names(tree, *path, "rest_of")
    for other in others:
        if other not in earlier:
            names = _listing(earlier) if earlier else "no stage, as this is the first"
            near = did_you_mean(other, [stage for stage in earlier if stage not in others])
            rule = f"rest_of names an earlier stage: {names}{near}"
            place = tree.nearest((*path, "rest_of")).place
            yield Problem(place=place, path=(*path, "rest_of"), found=f"'{other}'", rule=rule)


def _train_rules(tree: Node) -> Iterator[Problem]:
    batch = _number(tree, None, "train", "global_batch_size")
    processes = _number(tree, 1, "train", "processes")
    if batch and processes is not None and processes > batch:
        rule = (
            f"every rank needs a sample in every step, so at most train.global_batch_size = {batch}"
        )
        yield _problem(tree, ("train", "processes"), rule)
    zero_stage = _number(tree, 2, "train", "zero_stage")
    precision = _text(tree, "model", "precision")
    if precision is not None and zero_stage is not None:
        refusal = precision_refusal(precision, zero_stage)
        if refusal is not None:
            yield _problem(tree, ("train", "zero_stage"), refusal)
    offload = _text(tree, "train", "offload")
    if offload is not None and zero_stage is not None:
        refusal = offload_refusal(offload, zero_stage)
        if refusal is not None:
            yield _problem(tree, ("train", "offload"), refusal)


def _evaluation_rules(tree: Node) -> Iterator[Problem]:
    stages = _value(tree, "stages")
    if not isinstance(stages, dict):
        return
    known = ["base", *stages]
    names = _names(tree, "evaluation", "when")
    if _value(tree, "evaluation", "when") is None and isinstance(_value(tree, "evaluation"), dict):
        names = ("base", "stage1", "stage2")
    for name in names:
        if name not in known:
            near = did_you_mean(name, [other for other in known if other not in names])
            rule = f"evaluation.when lists {_listing(known)}{near}"
            path = ("evaluation", "when")
            node = tree.nearest(path)
            yield Problem(place=node.place, path=path, found=f"'{name}'", rule=rule)


def _near(word: str, allowed: list[str], own: str, stages: list[str]) -> str:
    if word == own:
        return "; a stage cannot start from itself"
    if word in stages:
        return f"; {word} comes later"
    return did_you_mean(word, allowed)


def _listing(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def _problem(tree: Node, path: tuple[str, ...], rule: str) -> Problem:
    node = tree.nearest(path)
    return Problem(place=node.place, path=path, found=show(node.plain()), rule=rule)


def _mapping(node: Node) -> dict[str, Node]:
    return node.value if isinstance(node.value, dict) else {}


def _value(tree: Node, *path: str) -> object:
    """The value at exactly `path`, or None."""
    node: Node | None = tree
    for part in path:
        node = _mapping(node).get(part) if node is not None else None
    return node.value if node is not None else None


def _text(tree: Node, *path: str) -> str | None:
    value = _value(tree, *path)
    return value if isinstance(value, str) else None


def _number(tree: Node, default: int | None, *path: str) -> int | None:
    """The whole number at `path`, `default` if the key is absent, None if it is no such number."""
    if path[-1] not in _mapping(tree.nearest(path[:-1])):
        return default
    value = _value(tree, *path)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _names(tree: Node, *path: str) -> tuple[str, ...]:
    value = _value(tree, *path)
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list):
        return tuple(item.value for item in value if isinstance(item.value, str))
    return ()
