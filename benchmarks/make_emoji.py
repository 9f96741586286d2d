"""Make the pictures of `data.dataset=emoji` again, bit for bit, from pinned packages of npm (node and npm are needed).

    python benchmarks/make_emoji.py emoji.xz [--packages=FOLDER]

A concept is an entry of emojibase that all three styles have, and has its five skin tones if all three have all of them. Noto's PNG
of 64 x 64 pixels are composited over white, (a c + 255 (255 - a)) / 255 for a colour c of opacity a, then averaged over 2 x 2 pixels,
each rounded to nearest. Drawings of the other two are rasterised at 32 x 32 with colours multiplied by their opacity, p, and become
p + 255 - a. The file is LZMA: a line of JSON, the concepts (name, tags, names with each tone), then the pixels uint8 (n, 32, 32, 3),
concept by concept, style by style, tone by tone. `--packages`: a folder where the packages are installed already.
"""

import argparse
import hashlib
import itertools
import json
import lzma
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from dit_jax.data import emoji

PACKAGES = (
    "emoji-datasource-google@16.0.0",
    "@iconify-json/fluent-emoji-flat@1.2.6",
    "@iconify-json/twemoji@1.2.5",
    "emojibase-data@17.0.0",
    "@resvg/resvg-js@2.6.2",
)
DRAWN = {"fluent": "@iconify-json/fluent-emoji-flat", "twemoji": "@iconify-json/twemoji"}
SIDE, TONES = emoji.SIDE, 5
RASTERISE = """
const fs = require("fs"), { Resvg } = require("@resvg/resvg-js"), out = fs.openSync(process.argv[3], "w");
for (const svg of JSON.parse(fs.readFileSync(process.argv[2])))
  fs.writeSync(out, new Resvg(svg, { fitTo: { mode: "width", value: SIDE }, font: { loadSystemFonts: false } }).render().pixels);
"""


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def key(code: str) -> str:
    """A sequence of code points without variation selectors, which packages write or leave out."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def plain(text: str) -> str:
    """With the apostrophe that keyboards have."""
    return text.replace("\u2019", "'")


def noto_pictures(packages: Path) -> dict[str, Path]:
    """The PNG of each sequence."""
    found = {}
    for entry in read_json(packages / "emoji-datasource-google/emoji.json"):
        for one in (entry, *entry.get("skin_variations", {}).values()):
            path = packages / "emoji-datasource-google/img/google/64" / one["image"]
            if one["has_img_google"] and path.exists():
                found[key(one["unified"])] = path
    return found


def drawings(package: Path) -> dict[str, str]:
    """The SVG of each sequence."""
    icons = read_json(package / "icons.json")
    width, height = icons["width"], icons["height"]

    def svg(name: str) -> str:
        alias = icons["aliases"].get(name, {})
        body = icons["icons"][alias.get("parent", name)]["body"]
        assert {*alias} <= {"parent", "hFlip"} and width == height, (name, alias)
        if alias.get("hFlip"):
            body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} {height}">'
        return f"{head}{body}</svg>"

    return {key(code): svg(name) for code, name in read_json(package / "chars.json").items()}


def on_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 (..., 4), colours not multiplied by opacity, to uint8 (..., 3)."""
    colour, opacity = rgba[..., :3].astype(np.int64), rgba[..., 3:].astype(np.int64)
    return ((colour * opacity + (255 - opacity) * 255 + 127) // 255).astype(np.uint8)


def multiplied_on_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 (..., 4), colours multiplied by opacity, to uint8 (..., 3)."""
    return (rgba[..., :3].astype(np.int64) + 255 - rgba[..., 3:]).clip(0, 255).astype(np.uint8)


def read_noto(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        found = on_white(np.asarray(image.convert("RGBA"))).astype(np.int64)
    assert found.shape == (2 * SIDE, 2 * SIDE, 3), (path, found.shape)
    return ((found.reshape(SIDE, 2, SIDE, 2, 3).sum((1, 3)) + 2) // 4).astype(np.uint8)


def rasterise(folder: Path, svgs: list[str]) -> np.ndarray:
    """Pixels uint8 (n, 32, 32, 3)."""
    script, given, made = folder / "rasterise.cjs", folder / "drawings.json", folder / "pixels"
    script.write_text(RASTERISE.replace("SIDE", str(SIDE)))
    given.write_text(json.dumps(svgs))
    subprocess.run(["node", script, given, made], check=True, cwd=folder)
    return multiplied_on_white(np.fromfile(made, np.uint8).reshape(len(svgs), SIDE, SIDE, 4))


def make(folder: Path) -> bytes:
    packages = folder / "node_modules"
    noto = noto_pictures(packages)
    drawn = {style: drawings(packages / name) for style, name in DRAWN.items()}
    assert ("noto", *drawn) == emoji.STYLES
    everywhere = {*noto}.intersection(*drawn.values())
    entries = [e for e in read_json(packages / "emojibase-data/en/data.json") if key(e["hexcode"]) in everywhere]
    concepts, codes = [], []
    for entry in sorted(entries, key=lambda e: e.get("order", 10**6)):
        skins = [skin for skin in entry.get("skins", []) if type(skin["tone"]) is int]
        skins = sorted((s for s in skins if key(s["hexcode"]) in everywhere), key=lambda s: s["tone"])
        skins = skins if [skin["tone"] for skin in skins] == list(range(1, TONES + 1)) else []
        concepts.append(
            [plain(entry["label"]), [*map(plain, entry.get("tags", []))], [plain(s["label"]) for s in skins]]
        )
        codes.append([key(one["hexcode"]) for one in (entry, *skins)])
    parts = [np.stack([read_noto(noto[code]) for some in codes for code in some])]
    parts += [rasterise(folder, [found[code] for some in codes for code in some]) for found in drawn.values()]
    starts = np.cumsum([0, *map(len, codes)])
    images = np.concatenate([part[a:b] for a, b in itertools.pairwise(starts) for part in parts])
    head = json.dumps(concepts, ensure_ascii=True, separators=(",", ":")).encode()
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26, "lc": 4, "lp": 0, "pb": 0}
    ]
    return lzma.compress(head + b"\n" + images.tobytes(), lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--packages", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) if args.packages is None else args.packages
        if args.packages is None:
            (folder / "package.json").write_text("{}")
            subprocess.run(
                ["npm", "install", "--ignore-scripts", "--no-fund", "--no-audit", *PACKAGES], check=True, cwd=folder
            )
        content = make(folder)
    args.out.write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    print(f"{args.out}: {len(content):,} bytes, SHA-256 {found}")
    if found != emoji.SHA256:
        sys.exit(f"expected SHA-256 {emoji.SHA256}")


if __name__ == "__main__":
    main()
