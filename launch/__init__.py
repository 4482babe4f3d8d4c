"""The `emoverse` command line, the worker program of every rank, and the SLURM launcher.

This is not the `launch` package of ROS 2, nor PyPI's `launch`; do not install either beside it,
because pip would merge the two folders into one.
"""
