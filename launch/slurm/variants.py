"""From one config to the runs of a launch: itself, or one run per variant and seed.

In: config files and overrides, variants (overlay files or overrides), seeds. Out: `Run`s, each with
a checked config and a run directory of its own below the common one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from emoverse.config.schema import Config, load_config
from emoverse.config.yaml_source import split_words


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run of a launch; `home` is the folder of all runs of the launch."""

    config: Config
    home: Path
    base_name: str


def make_runs(
    paths: Sequence[Path],
    overrides: Sequence[str],
    *,
    variants: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> tuple[Run, ...]:
    """One run per variant and seed, in this order; without either the run itself.

    variants: a YAML overlay's path, or overrides separated by spaces. A variant's run directory
        is run.run_dir/NAME, NAME being the file's stem or the override in letters and digits.

    Raises:
        ValueError: two runs have the same name; or a config is wrong.
    """
    base = load_config(paths, overrides)
    home, name = base.run.run_dir, base.run.name
    if not variants and not seeds:
        return (Run(config=base, home=home, base_name=name),)
    runs, names = [], []
    every_seed: Sequence[int | None] = seeds or (None,)
    for variant, seed in product(variants or [""], every_seed):
        files, words = split_words(variant.split())
        label = "-".join([*(file.stem for file in files), *map(_slug, words)])
        if seed is not None:
            words = [*words, f"run.seed={seed}"]
            label = f"{label}-seed{seed}" if label else f"seed{seed}"
        own = [*overrides, *words, f"run.name={name}-{label}", f"run.run_dir={home / label}"]
        runs.append(Run(config=load_config([*paths, *files], own), home=home, base_name=name))
        names.append(label)
    repeated = sorted({label for label in names if names.count(label) > 1})
    if repeated:
        raise ValueError(
            f"two runs would share the run directory {home / repeated[0]}; give every variant and "
            "every seed once"
        )
    return tuple(runs)


def _slug(word: str) -> str:
    """An override in a folder's name: `stages.stage1.rates.fer=1/5` becomes `rates.fer_1_5`."""
    key, _, value = word.partition("=")
    return re.sub(r"[^A-Za-z0-9.]+", "_", f"{'.'.join(key.split('.')[-2:])}_{value}").strip("_")
