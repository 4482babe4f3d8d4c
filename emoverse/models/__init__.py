"""The model: released checkpoints in, EmoVerse out (architecture, import/export, LoRA, forward)."""
