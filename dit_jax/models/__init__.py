"""Backbones as two functions, `init(cfg, key) -> params` and `apply(cfg, params, x, t, cond) -> out`; the only package that imports flax.

Axis letters: b batch, h w image, c channels, n tokens, d width, k heads, l layers.
"""
