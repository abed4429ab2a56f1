"""FX passes, one per file; `pipeline` holds their order. Import as `triton_only_backend.passes`."""
