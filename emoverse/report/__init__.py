"""The static HTML report of a run and its summary table.

Entry point: `report.write_report`.
"""
