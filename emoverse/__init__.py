"""EmoVerse: an emotional multimodal language model, its two-stage training and its evaluation.

Importing the package imports nothing else: `emoverse.config` and `emoverse.training.stages` stay
free of torch, so that the command line answers at once.
"""

__version__ = "0.1.0"
