"""Look at a model (capture), decide where quantizers go (placement), put them there (rewrite)."""
