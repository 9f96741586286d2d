"""Files of a run folder besides checkpoints: config, scalars, goodput, manifests, records."""
