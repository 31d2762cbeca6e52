"""Look at a model (capture), decide where quantizers go (placement), and put them there (rewrite)."""
