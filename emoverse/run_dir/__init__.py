"""What a run directory holds and who may write it: checkpoints, lineage, run lock, run files.

Entry points: `checkpoint.save_checkpoint`, `run_lock.acquire`.
"""
