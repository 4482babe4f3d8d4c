"""The verbs about shard folders: build, annotate, convert, lint, preview, stats.

Each has `add_arguments(parser)` and `run(args)`; `launch.cli` dispatches.
"""
