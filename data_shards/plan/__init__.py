"""The plan: which record is trained for which task at which position, exactly by the rates.

Entry points: `plan.plan_stages`, `sampler.WeightedTaskSampler`, `rates` for the exact task mixing.
"""
