"""A trained state as a folder that others load, with its model card.

Entry point: `export.run`.
"""
