"""Table of the metrics of drawn images, in the order of the records. A new metric is a file with a row, listed here."""

from dit_jax.metrics import clipscore, composition, fid, inception_score, kernel, precision_recall, psnr
from dit_jax.metrics.metric import Metric

ROWS = (
    fid.FID,
    fid.SFID,
    inception_score.IS,
    kernel.KID,
    precision_recall.PRECISION,
    precision_recall.RECALL,
    composition.COMPOSITION,
    clipscore.CLIPSCORE,
    psnr.PSNR,
)
METRICS: dict[str, Metric] = {row.name: row for row in ROWS}
