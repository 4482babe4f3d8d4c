"""From the items of a source to a shard folder, in several processes, resumable.

Entry points: `build.build_shards`, `journal` for an unfinished build, `worker_pool.ordered_map`.
"""
