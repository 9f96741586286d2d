"""Our parameters as other projects' files hold them: what the readers of `dit_jax.networks` are tested with."""

import io
import json
import string

import jax
import numpy as np
from safetensors.numpy import save_file

from dit_jax.networks import diffusers_dit, inception, text, vae
from dit_jax.networks.tensors import Tensors


def write_vae(cfg, params):
    """An autoencoder's tensors under diffusers' names and in its layout, float32."""
    name_of = vae._namer(cfg, "", vae._DIFFUSERS)
    found = {name_of(path): np.asarray(leaf, np.float32) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    return {n: np.ascontiguousarray(v.transpose(3, 2, 0, 1) if v.ndim == 4 else v.T) for n, v in found.items()}


def write_inception(params):
    """The Inception network's state dict by its published names."""
    found = {}
    for path, layer in inception._layers(params):
        name, kernel = ".".join(path), np.asarray(layer["kernel"])
        if path == ("fc",):
            found |= {"fc.weight": np.ascontiguousarray(kernel.T), "fc.bias": np.asarray(layer["bias"])}
            continue
        found[f"{name}.conv.weight"] = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
        found |= {f"{name}.{theirs}": np.asarray(layer[ours]) for ours, theirs in inception.NORM.items()}
    return found


write_diffusers_dit = diffusers_dit.write


def write_encoder(folder, kind, cfgs, params, vocabulary=40):
    """A folder of transformers with encoders, {half: config} and {half: parameters}, and a tokenizer of `vocabulary` entries."""
    folder.mkdir(parents=True)
    save_file(encoder_tensors(kind, cfgs, params), folder / "model.safetensors")
    stated = {
        half: {key: getattr(cfg, ours) for ours, (key, _) in text.KEYS[type(cfg)].items()} for half, cfg in cfgs.items()
    }
    if kind == "clip" and len(cfgs) == 2:
        config = {"model_type": "clip", **{f"{half}_config": values for half, values in stated.items()}}
    else:
        config = {
            "model_type": f"clip_{next(iter(cfgs))}_model" if kind == "clip" else kind,
            **stated[next(iter(cfgs))],
        }
    config |= {"feed_forward_proj": "gated-gelu"} if kind == "t5" else {}
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in tokenizer_files(kind, vocabulary).items() if "text" in cfgs else ():
        (folder / name).write_bytes(content)


def encoder_tensors(kind, cfgs, params, prefix=True):
    """Encoders' tensors under the names and in the layout of transformers; `prefix`: CLIP's names say which half they are of."""
    found = {}
    for half in cfgs:
        name_of = text._namer(kind, half, Tensors({f"{half}_model.": np.zeros(1)} if prefix else {}, ""), len(cfgs) > 1)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params[half]):
            *module, last = [part.key for part in path]
            name = name_of("/".join(module or [last]))
            name = name if name.endswith(".weight") or not module else f"{name}.{text.LEAVES[last]}"
            layers = list(leaf) if path[0].key == "blocks" else [leaf]
            found |= {name.format(i): _theirs(np.asarray(layer), module, last) for i, layer in enumerate(layers)}
    return found


def _theirs(leaf, module, last):
    if module == ["patches"]:
        side = round((len(leaf) // 3) ** 0.5)
        return np.ascontiguousarray(leaf.reshape(side, side, 3, -1).transpose(3, 2, 0, 1))
    if last == "kernel":
        into = 2 if module[-1] == "out" else 1
        return np.ascontiguousarray(leaf.reshape(int(np.prod(leaf.shape[:into])), -1).T)
    return np.ascontiguousarray(leaf.reshape(-1) if last == "bias" else leaf)


SENTENCES = ["a red cat", "pack my box with five dozen liquor jugs", "the quick brown fox jumps over the lazy dog"] * 20


def tokenizer_files(kind, vocabulary=40):
    """A tokenizer's files of so many entries that knows the letters of "a red cat"."""
    letters = list(string.ascii_lowercase)
    if kind == "bert":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "red", *letters, *(f"##{c}" for c in letters)]
        return {"vocab.txt": "".join(f"{word}\n" for word in words[:vocabulary]).encode()}
    if kind == "clip":
        some = list("abcdehnorstilmupgy")[: vocabulary // 2 - 2]
        words = [*some, *(f"{c}</w>" for c in some), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
        names = {word: i for i, word in enumerate(words)}
        return {"vocab.json": json.dumps(names).encode(), "merges.txt": b"#version: 0.2\nc a\nca t</w>\n"}
    import sentencepiece  # of the extra `text`

    model = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        minloglevel=2,
        **ids,
    )
    return {"spiece.model": model.getvalue()}
