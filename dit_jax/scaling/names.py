"""The words that options and results share: methods, losses, residuals, what is dropped or held out, and what samplings differ in."""

METHODS = ("isoflop", "varpro", "surface", "akima", "gadre", "power")  # in the order of `fits.METHODS`
RESIDUALS, LOSSES = ("log", "linear"), ("huber", "mse")
DROPPED = ("missing", "duplicates", "diverged", "outliers")  # in the order in which they are looked for
SPLITS = ("largest", "budgets", "models")
SAMPLING = ("sampler", "steps", "guidance", "spacing")  # fields of protocol.samples that points may differ in
EXPLAINED = {  # what a method does, in a sentence
    "isoflop": "A parabola of loss against log N at each compute budget; the laws go through the minima.",
    "akima": "An interpolated curve of log loss against log N at each compute budget; the laws go through its lowest points.",
    "surface": "L = E + A / N^alpha + B / D^beta through all runs at once, by a Huber loss of the log residuals from many starts.",
    "varpro": "L = E + A / N^alpha + B / D^beta through all runs at once, by least squares with E, A and B solved for each alpha and beta.",
    "gadre": "L = E + A N^-b + B D^-b: one exponent for both terms, so N_opt grows as the square root of compute by assumption.",
    "power": "A power law of compute through the best run of each budget; it says nothing of model sizes.",
}
