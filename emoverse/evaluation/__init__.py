"""Evaluation: metric definitions, parsing of answers, baselines, intervals, result files.

Entry points: `evaluate.run`, `metrics` for every definition, `registry` for the list per task.
"""
