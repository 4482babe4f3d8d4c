"""The verb `train`: trains the stages of a config on this machine.

In: the config, the stages, how to start. Out: the run directory and the exit code of the ranks.
"""

import argparse

from emoverse.config.schema import load_config
from emoverse.training.stages import stages_to_train
from launch.local import run_local
from launch.verb_tools import add_config, config_words
from launch.worker import FLAGS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Config, stages and the flags of the worker."""
    add_config(parser)
    parser.add_argument(
        "--stage",
        action="append",
        metavar="NAME",
        help="train only this stage (may be given several times); default: all, in order",
    )
    for name, meaning in FLAGS.items():
        parser.add_argument(name, action="store_true", help=meaning)


def run(args: argparse.Namespace) -> int:
    """Train. Raises ValueError for a wrong config before any rank starts."""
    config = load_config(*config_words(args.config))
    stages = stages_to_train(config, args.stage)
    given = vars(args)
    flags = [name for name in FLAGS if given[name[2:].replace("-", "_")]]
    return run_local(config, stages=stages, flags=flags)
