"""Import and export of InternVL checkpoints: released layout and native classes, both ways.

Entry points: `checkpoint.import_checkpoint`, `checkpoint.export_checkpoint`.
"""
