"""The verbs of `emoverse` about shard folders: build, annotate, convert, lint, preview, stats.

Each has `add_arguments(parser)` and `run(args)`, which returns the exit code for `launch.cli`.
"""
