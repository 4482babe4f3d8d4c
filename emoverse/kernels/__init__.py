"""The hot operations behind plain functions, one module each; `triton_ops` has the Triton kernels.

`layer` joins them to a lean decoder layer. `reference` holds the implementations that tests compare
with.
"""
