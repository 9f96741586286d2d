"""The isoFLOP ladder: train it, evaluate it, fit its law, and test the law on a larger model."""
