"""Images or latents on disk -> batches of arrays: kinds of data (`source`), one file each, and their order (`pipeline`)."""
