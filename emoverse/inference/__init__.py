"""Answers of a trained state: which held-out samples are asked, and generation.

Entry points: `held_out.choose_entries`, `generate.generate_answers`.
"""
