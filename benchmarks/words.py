"""Train a model of words on scenes, score it on seen and on unseen pairs, and show what it draws: `make words`.

    python benchmarks/words.py runs/words [--config=configs/scenes.py] [--samples=2000]

W/report.html has the scores of each kind of prompt with 95 % intervals, beside those of real pictures, which the classifier of digits
limits, and pictures with their prompts. The training and the scores that are there are not made again.
"""

import argparse
import dataclasses
import json
import os
from importlib.metadata import version

import numpy as np
from jinja2 import Environment, StrictUndefined

from dit_jax import flops
from dit_jax.config import Config, resolve
from dit_jax.data.scenes import ASKED, asked, parse
from dit_jax.data.source import all_of, open_source
from dit_jax.data.words import prompts
from dit_jax.devices.mesh import make_mesh
from dit_jax.evaluation.run import run as evaluate
from dit_jax.evaluation.scores import open_network
from dit_jax.files import write_file
from dit_jax.job.compiled import use_cache
from dit_jax.job.launch import load_config
from dit_jax.log import say, table
from dit_jax.metrics.composition import COMPOSITION
from dit_jax.sampling.prompt import Prompts
from dit_jax.sampling.run import Request
from dit_jax.sampling.run import run as sample
from dit_jax.training import loop

SPLITS = {"test": "seen pairs", "unseen": "held-out pairs"}
DRAWN = 8  # pictures of each prompt that is shown
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse } tr { border-bottom: 1px solid #ccc }
td, th { padding: .2em .8em; text-align: right } td:first-child, th:first-child { text-align: left }
img { max-width: 100%; image-rendering: pixelated }
</style>
<h1>{{ title }}</h1><p>{{ about }}</p>
<h2>How many pictures show what the prompt says</h2>
<p>Percent, with 95 % intervals. All digits and colours have to be right, none missing and none too many, and the place or relation that
is stated. Real pictures are scored in the same way: what they lack is the classifier's mistakes.</p>
<table><tr>{% for name in head %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for split, name in splits.items() %}<h2>Prompts of {{ name }}</h2><img src="{{ split }}.png" alt="{{ name }}">
{% endfor %}</html>
"""


def real(cfg: Config, split: str, most: int) -> dict:
    """Scores of the real pictures of a split."""
    mesh, source = make_mesh(cfg.mesh), open_source(all_of(cfg.data), split)
    images, _ = source.read(np.arange(min(most, len(source))))
    cells = np.asarray(open_network(cfg, mesh).rows(images))[:, -40:]
    found = COMPOSITION.finish([(cells, images)], {"prompts": asked(prompts(source, len(images)))}, None)
    return {f"composition_scenes{name}": value for name, value in found.items()}


def shown(found: dict, kind: str) -> str:
    """A score in percent with its interval."""
    name = "_".join(["composition_scenes", *[kind] * bool(kind)])
    if name not in found:
        return ""
    return f"{100 * found[name]:.1f} ({100 * found[name + '_low']:.1f} to {100 * found[name + '_high']:.1f})"


def of_each_kind(cfg: Config, split: str) -> list[str]:
    """The first caption of a split of each kind of prompt."""
    some = prompts(open_source(all_of(cfg.data), split), 500)
    firsts = {}
    for text in some:
        firsts.setdefault(parse(text)[0], text)
    return [firsts[kind] for kind in ASKED if kind in firsts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir")
    parser.add_argument("--config", default="configs/scenes.py")
    parser.add_argument("--samples", type=int, default=2000, help="pictures drawn for each score")
    args = parser.parse_args()
    cfg = load_config(args.config)
    cfg.eval.samples = args.samples
    cfg, page = resolve(cfg), os.path.join(args.workdir, "report.html")
    use_cache(os.path.join(args.workdir, "compiled"))
    loop.run(cfg, args.workdir)
    scores, truth = {}, {}
    for split, name in SPLITS.items():
        own = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, held_out_split=split))
        records = evaluate(own, args.workdir, [cfg.train.steps])
        scores[split] = next(r["metrics"] for r in records if "composition_scenes" in r["metrics"])
        truth[split] = real(own, split, 4096)
        texts, grid = of_each_kind(own, split), os.path.join(args.workdir, f"{split}.png")
        wanted = Request(args.workdir, DRAWN * len(texts), 0, None, "", grid, "", prompts=Prompts(tuple(texts)))
        sample(own, wanted, [])
        say(f"{name}: {grid}")
    head = ["prompt", *(f"{whose}{name}" for name in SPLITS.values() for whose in ("", "real pictures, "))]
    rows = [
        [kind or "all", *(shown(found[split], kind) for split in SPLITS for found in (scores, truth))]
        for kind in ("", *ASKED)
    ]
    table(head, rows)
    model, size = cfg.model, flops.parameters(cfg.model)
    about = (
        f"{args.config}: {model.conditioning}, text as {model.text}, {size:,} parameters, {cfg.train.steps:,} steps of "
        f"{cfg.train.batch_size} images, {args.samples:,} pictures a score ({cfg.sample.sampler}, {cfg.sample.steps} steps, "
        f"guidance {cfg.sample.guidance:g}), dit_jax {version('dit_jax')}"
    )
    filled = {"title": "Words on handwriting", "about": about, "head": head, "rows": rows, "splits": SPLITS}
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(PAGE)
    write_file(page, template.render(filled))
    write_file(
        os.path.join(args.workdir, "scores.json"), json.dumps({"scores": scores, "real": truth}, indent=1) + "\n"
    )
    print(page)


if __name__ == "__main__":
    main()
