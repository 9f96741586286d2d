"""Composition: the share of pictures that show what their prompt says, for scenes of coloured digits in the four quarters of a picture.

A quarter holds a digit if it is bright enough; its colour is the nearest of the palette to the mean one, and which digit it is says a
classifier of digits. A picture is right if the digits with their colours are those of the prompt, none missing and none too many, and if
the place or the relation that the prompt states holds. Categories are those of GenEval (Ghosh et al. 2023, arXiv 2310.11513), in
which detectors look: single objects, two objects with attributes, positions, counting; here all of it is exact but the classifier.
"""

import math
from typing import NamedTuple

import numpy as np

from dit_jax.metrics.metric import Metric

QUARTERS, DIGITS = 4, 10
BRIGHT = 16.0  # least mean, over a quarter, of the brightest channel of 0 to 255; digits have 40 and more
NONE = -1
LEVEL = 1.96  # of the normal, for 95 %


class Prompts(NamedTuple):
    """What n prompts ask for, as arrays of numbers; NONE fills up. Sample i is drawn for prompt i modulo n.

    digits, colours (n, 4)   of the things that are named, in order
    places (n, 4)            quarter that is stated of each thing, row by row
    relation (n,)            of the first to the second: a row of `SHIFTS`
    kind (n,)                a number in `kinds`
    """

    digits: np.ndarray
    colours: np.ndarray
    places: np.ndarray
    relation: np.ndarray
    kind: np.ndarray
    kinds: tuple[str, ...]
    palette: np.ndarray  # (colours, 3), 0 to 255


SHIFTS = (
    (0, -1),
    (0, 1),
    (-1, 0),
    (1, 0),
)  # left of, right of, above, below: rows and columns from the second to the first


def detect(logits: np.ndarray, images: np.ndarray, palette: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Digit and colour of each quarter, int (b, 4), NONE if it is empty. `logits` (b, 4 * 10) of the quarters, `images` (b, h, w, 3)."""
    b, h, w, _ = images.shape
    quarters = (
        images.reshape(b, 2, h // 2, 2, w // 2, 3)
        .transpose(0, 1, 3, 2, 4, 5)
        .reshape(b, QUARTERS, -1, 3)
        .astype(np.float64)
    )
    there = quarters.max(axis=-1).mean(axis=-1) >= BRIGHT
    mean = quarters.mean(axis=2)
    mean /= np.maximum(mean.max(axis=-1, keepdims=True), 1e-9)
    known = palette / palette.max(axis=-1, keepdims=True)
    colours = np.square(mean[:, :, None] - known).sum(axis=-1).argmin(axis=-1)
    digits = logits.reshape(b, QUARTERS, DIGITS).argmax(axis=-1)
    return np.where(there, digits, NONE), np.where(there, colours, NONE)


def right(digits: np.ndarray, colours: np.ndarray, prompts: Prompts, rows: np.ndarray) -> np.ndarray:
    """Whether what was found in the quarters (b, 4) is what prompts number `rows` (b,) ask for, bool (b,)."""
    code = lambda d, c: np.where(d == NONE, NONE, d * len(prompts.palette) + c)  # noqa: E731
    found, asked = code(digits, colours), code(prompts.digits[rows], prompts.colours[rows])
    good = (np.sort(found, axis=1) == np.sort(asked, axis=1)).all(axis=1)
    places, relation = prompts.places[rows], prompts.relation[rows]
    quarters = np.arange(QUARTERS)
    first, second = found == asked[:, :1], found == asked[:, 1:2]  # where the first and the second thing may be
    good &= ((places == NONE) | (np.take_along_axis(found, places, axis=1) == asked)).all(axis=1)
    for number, (down, across) in enumerate(SHIFTS):
        row, column = quarters // 2, quarters % 2
        holds = (row[:, None] - row == down) & (
            column[:, None] - column == across
        )  # (quarter of the first, of the second)
        there = (first[:, :, None] & second[:, None] & holds).any(axis=(1, 2))
        good &= (relation != number) | there
    return good


def interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share seen in `count` independent trials (Wilson 1927)."""
    z, middle = LEVEL**2 / count, share + LEVEL**2 / (2 * count)
    half = LEVEL * math.sqrt(share * (1 - share) / count + z / (4 * count))
    return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))


def _update(state, batch: dict, total: int) -> list:
    return [*(state or []), (batch["cells"], batch["images"])]


def _finish(state, reference: dict, settings) -> dict[str, float]:
    """Share of all samples, and of each kind of prompt, with intervals."""
    prompts = reference["prompts"]
    seen = [detect(cells, images, prompts.palette) for cells, images in state]
    digits, colours = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    rows = np.arange(len(digits)) % len(prompts.kind)
    good, kinds = right(digits, colours, prompts, rows), prompts.kind[rows]
    found = {}
    for ending, chosen in [
        ("", np.ones(len(good), bool)),
        *((f"_{kind}", kinds == k) for k, kind in enumerate(prompts.kinds)),
    ]:
        if count := int(chosen.sum()):
            share = float(good[chosen].mean())
            low, high = interval(share, count)
            found |= {ending: share, f"{ending}_low": low, f"{ending}_high": high}
    return found


COMPOSITION = Metric(
    "composition",
    needs=("cells", "images", "prompts"),
    update=_update,
    finish=_finish,
    higher_is_better=True,
    rules={"composition": f"quarters of a mean of at least {BRIGHT:g}, nearest colour, Wilson's interval"},
)
