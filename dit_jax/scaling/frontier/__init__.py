"""Metrics of samples: laws of compute, the choice of guidance, two ladders side by side, and the cost of an image."""
