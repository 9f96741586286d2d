"""Other people's weights in and out: `python -m dit_jax.convert --source=dit --weights=FILE --out=W`."""
