"""Videos, the five tasks, shards, and the exact plan of which record is trained for which task.

Nothing here knows a model or a tokenizer: the package builds, checks, plans and streams alone.
"""
