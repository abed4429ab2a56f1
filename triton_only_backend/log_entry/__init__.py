"""Installed as `triton_only`, so that `TORCH_LOGS="triton_only"` is a name that PyTorch takes.

PyTorch reads TORCH_LOGS while it is imported, before anyone could register a log, and refuses a
name that is neither its own nor a module's. The logger of this package has this module's name.
"""
