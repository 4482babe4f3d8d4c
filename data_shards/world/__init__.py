"""The synthetic world: faces driven by action units, people who talk, and what happens to them."""
