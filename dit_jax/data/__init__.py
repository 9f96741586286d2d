"""Images or latents on disk to batches of arrays: TFDS (`datasets`), `latents`, what a config names (`source`), grain (`pipeline`)."""
