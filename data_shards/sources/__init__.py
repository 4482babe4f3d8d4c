"""Raw corpora: each module turns one corpus into the items of a build.

Entry point: `registry.SOURCES`.
"""
