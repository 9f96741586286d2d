"""Evaluation: protocols, held-out loss and sample metrics of checkpoints."""
