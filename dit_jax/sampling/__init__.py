"""Sampling: images from a model, kept on disk as they are drawn."""
