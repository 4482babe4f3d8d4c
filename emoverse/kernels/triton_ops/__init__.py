"""Triton kernels, one module per operation of `emoverse.kernels`, same names.

They are chosen by `emoverse.kernels.backend`; nothing else imports them.
"""
