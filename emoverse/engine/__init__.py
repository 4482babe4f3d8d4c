"""DeepSpeed and the ranks: process group, optimiser step, step consensus, watchdog, health.

Entry points: `deepspeed_engine.Engine`, `distributed.World`.
"""
