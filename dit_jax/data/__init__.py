"""Images or latents on disk to batches of arrays: kinds of data (`source`), one file each, and their order (`pipeline`)."""
