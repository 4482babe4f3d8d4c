"""The config of a run: YAML and overrides in, one validated tree of sections out. No torch.

Entry points: `schema.load_config`, `schema.Config`, `errors.ConfigError`.
"""
