"""From a fit and a budget to a run: the size (`plan`), the whole run (`recipe`), what another size costs (`overhead`), what to train next
(`design`)."""
