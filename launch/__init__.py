"""The front door of EmoVerse: the `emoverse` command line and the worker behind it.

This is not the `launch` package of ROS 2, nor PyPI's `launch`; do not install either beside it,
because pip would merge the two folders into one.
"""
