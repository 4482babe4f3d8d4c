"""The verb `pretrain`: makes the nano base model of a pretraining config."""

import argparse

from launch.verb_tools import add_config, add_json, config_words, print_result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The pretraining config."""
    add_config(parser, example="basics.steps=10")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Pretrain and print the provenance with the gate figures."""
    # Here, since they import torch, which the help does not need.
    from emoverse.config.schema import load_model
    from emoverse.nano.pretrain import pretrain
    from emoverse.nano.pretrain_config import PretrainConfig

    config = load_model(PretrainConfig, *config_words(args.config))
    return print_result(pretrain(config), args)
