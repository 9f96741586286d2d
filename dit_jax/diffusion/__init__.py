"""Processes, objectives, guidance and samplers over one interface, `denoise(x, t)`, with t in [0, 1] and t = 1 pure noise."""
