"""Memory and time of a config in closed form. No torch.

Entry points: `memory.estimate_memory`, `memory.memory_report`, `flops.flops_report`.
"""
