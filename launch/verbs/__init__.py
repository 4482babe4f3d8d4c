"""The verbs of `emoverse` about models and runs; those about shard folders are in `data`.

Each has `add_arguments(parser)` and `run(args)`, which returns the exit code for `launch.cli`.
"""
