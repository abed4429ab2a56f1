"""Triton kernels, one per file; `ops` registers them. Import as `triton_only_backend.kernels`."""
