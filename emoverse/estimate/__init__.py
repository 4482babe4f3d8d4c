"""Memory and time of a config in closed form. No torch.

Entry points: `memory.memory_need`, `flops`.
"""
