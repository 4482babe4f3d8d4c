"""From records to packed batches: prompt, token ids, packs, data workers, shared memory.

Entry point: `pipeline.build_loader`.
"""
