"""Weights of other projects, in and out, and folders of converted networks."""
