"""The exhaustive search for kernel configurations: `triton-only tune`."""
