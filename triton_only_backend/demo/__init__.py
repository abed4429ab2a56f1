"""The model that ships with the package, and what `triton-only demo` does with it."""
