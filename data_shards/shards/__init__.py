"""Shard folders on disk: records, WebDataset tars, their index, local or remote reading.

Entry points: `open.open_index`, `index.ShardIndex`, `reader.ShardReader`, `record.Record`.
"""
