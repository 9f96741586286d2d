"""What a run folder holds besides checkpoints: config, scalars, goodput, manifests, records."""
