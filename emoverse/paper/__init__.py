"""The paper's tables, the authors' scoring script, and the ablation tables.

Entry points: `tables`, `authors_script`, `ablation_tables`.
"""
