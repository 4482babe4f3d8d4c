"""Training of stages: the loop, what a stage needs, telemetry, loss guard, sample audit.

Entry point: `train.train_stages`.
"""
