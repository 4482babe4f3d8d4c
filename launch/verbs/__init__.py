"""One module per verb of the `emoverse` command line.

Each has `add_arguments(parser)` and `run(args)`; `launch.cli` dispatches.
"""
