"""The words that options and results share: methods, losses, residuals, what is dropped or held out, and what samplings differ in."""

METHODS = ("isoflop", "varpro", "surface", "akima", "gadre", "power")  # in the order of `fits.METHODS`
RESIDUALS, LOSSES = ("log", "linear"), ("huber", "mse")
DROPPED = ("duplicates", "diverged", "outliers")  # in the order in which they are looked for
SPLITS = ("largest", "budgets", "models")
SAMPLING = ("sampler", "steps", "guidance", "spacing")  # fields of protocol.samples that points may differ in
