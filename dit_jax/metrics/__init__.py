"""Metrics of samples from streamed features: arrays in, numbers out; no mesh, no files."""
