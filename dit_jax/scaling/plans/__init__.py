"""From a fit and a budget to a run: the size (`plan`), the whole run (`recipe`), what another size costs (`overhead`), the size that is
best once images are drawn from it (`serving`), and what to train next (`design`)."""
