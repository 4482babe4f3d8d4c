"""From records to packed batches: prompt, token ids, packs, data workers, shared memory.

Entry points: `loader.build_loader`; `pipeline.BatchPipeline` shows the data flow of one step.
"""
