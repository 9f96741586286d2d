"""Small encoders of text and images, for tests."""

import jax
import numpy as np

from dit_jax.models import bert, clip, t5

SMALL = {"depth": 2, "width": 16, "heads": 2, "hidden": 24}
VOCABULARY = 40
TEXT = clip.TextConfig(**SMALL, vocabulary=VOCABULARY, positions=12, projection=10, end=VOCABULARY - 1)
VISION = clip.VisionConfig(**SMALL, size=8, patch=4, projection=10)
T5 = t5.T5Config(**SMALL, head_width=4, vocabulary=VOCABULARY)  # heads that do not fill the width
BERT = bert.BertConfig(**SMALL, vocabulary=VOCABULARY, positions=12)
MODULES = {clip.TextConfig: clip, clip.VisionConfig: clip, t5.T5Config: t5, bert.BertConfig: bert}


def drawn(cfg, seed=0):
    """Parameters of which no two are alike; norms' scales are near 1."""
    draw = np.random.default_rng(seed)

    def leaf(path, shape):
        return float(path[-1].key == "scale") + 0.3 * draw.standard_normal(shape.shape, np.float32)

    return jax.tree_util.tree_map_with_path(leaf, MODULES[type(cfg)].shapes(cfg))


KINDS = {"clip": {"text": TEXT, "vision": VISION}, "t5": {"text": T5}, "bert": {"text": BERT}}
