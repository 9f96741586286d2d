"""The words that options and results share: methods, losses, residuals, what is dropped or held out, what samplings differ in, and the
files that figures are written to."""

METHODS = ("isoflop", "varpro", "surface", "akima", "gadre", "power")  # in the order of `fits.METHODS`
ANSWER = METHODS[:3]  # the methods that answer; the others check published numbers
RESIDUALS, LOSSES = ("log", "linear"), ("huber", "mse")
DROPPED = ("missing", "duplicates", "diverged", "outliers")  # in the order in which they are looked for
SPLITS = ("largest", "budgets", "models")
HOW = (
    "interval",
    "guide",
    "rescale",
    "reuse",
    "quantize",
    "times",
)  # of these, how guidance acts, the share of the blocks that is computed, how they are, and stated times
SAMPLING = ("sampler", "steps", "guidance", "spacing", *HOW)  # fields of protocol.samples that points may differ in
FIGURES = (".png", ".svg", ".pdf")  # endings of files
EXPLAINED = {  # what a method does, in a sentence
    "isoflop": "A parabola of the loss against log N at each compute budget, and power laws of compute through the minima.",
    "akima": "A smooth curve through the log losses at each compute budget, and power laws of compute through its lowest points.",
    "surface": "L = E + A / N^alpha + B / D^beta through all runs at once, by a Huber loss, in which single bad runs count little.",
    "varpro": "L = E + A / N^alpha + B / D^beta through all runs at once, by least squares, in which a bad run counts fully.",
    "gadre": "L = E + A N^-b + B D^-b: one exponent for both terms, so N_opt grows as the square root of compute by assumption.",
    "power": "A power law of compute through the best run of each budget; it says nothing of model sizes.",
}
