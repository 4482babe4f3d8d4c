"""Pre-training of EmoVerse-nano, the small base model that is part of the package.

Entry points: `pretrain.run`, `train_tokenizer.train_tokenizer`, `gates`.
"""
