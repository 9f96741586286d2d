"""Metrics of samples, as streamed statistics of features: arrays in, numbers out; no mesh, no files."""
