"""The hot operations behind plain functions: attention over packed segments, the loss head."""
