"""Images on disk to batches of arrays: TFDS builders and sources (`datasets`), grain pipelines (`pipeline`)."""
