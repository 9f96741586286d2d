"""Convert other projects' weights to ours, and ours to the published names.

    python -m dit_jax.convert --source=dit --weights=DiT-XL-2-256x256.pt --out=W             the published PyTorch checkpoint
    python -m dit_jax.convert --source=dit --weights=0400000.pt --out=W                      a checkpoint of its training
    python -m dit_jax.convert --source=diffusers --weights=DiT-XL-2-256 --out=W              a pipeline or its transformer
    python -m dit_jax.convert --source=sd-vae --weights=FILE_OR_FOLDER --out=DIR             SD's, SD3's or FLUX's
    python -m dit_jax.convert --source=inception --weights=FILE --out=DIR
    python -m dit_jax.convert --source=clip --weights=FOLDER --out=DIR       CLIP's encoders of text and images, or one of them
    python -m dit_jax.convert --source=t5 --weights=FOLDER --out=DIR         the encoder of a T5 v1.1; --source=bert: a BERT
    python -m dit_jax.convert --source=workdir --weights=W --out=FILE.safetensors            a run, under the published names
    python -m dit_jax.convert --source=workdir --weights=W --out=FOLDER                      a run, as a folder of diffusers

A DiT becomes a run folder W for `sample` and `evaluate`. Its config is the one noted in a file that we exported, else
configs/imagenet256.py or imagenet512.py with the file's own model; its one checkpoint holds the weights as `params` and as
`ema`, and the SHA-256 of the file. The other networks become folders (`dit_jax.networks.folder`), an encoder of text with
its tokenizer. Files are read as plain tensors only (`dit_jax.networks.weights`). Says what was found. Output appears whole
or not at all; the same command again finds it done.
"""

from absl import flags

from dit_jax.error import UsageError
from dit_jax.files import exists, is_folder
from dit_jax.job.launch import launch

DITS, NETWORKS, ENCODERS, WORKDIR = ("dit", "diffusers"), ("sd-vae", "inception"), ("clip", "t5", "bert"), "workdir"


def main() -> None:
    from dit_jax.networks.transfer import export_dit, import_dit, import_encoder, import_network

    values = flags.FLAGS
    if values.source == WORKDIR:
        export_dit(values.weights, values.out, values.item or "ema", values.step)
        return
    if exists(values.out) and not is_folder(values.out):
        raise UsageError(f"--out: {values.out!r} is a file, expected a folder")
    for flag, sources in (("heads", ("dit",)), ("classes", ("dit",)), ("step", DITS), ("item", (*DITS, "sd-vae"))):
        if values[flag].value is not None and values.source not in sources:
            raise UsageError(f"--{flag}: is for --source={' or '.join(sources)}, not {values.source}")
    at = values.source, values.weights, values.out
    if values.source in DITS:
        import_dit(*at, values.heads or 0, values.step, values.classes or 0, values.item or "")
        return
    if values.source in ENCODERS:
        import_encoder(*at)
        return
    import_network(*at, values.item or "")


if __name__ == "__main__":
    flags.DEFINE_enum("source", None, [*DITS, *NETWORKS, *ENCODERS, WORKDIR], "what --weights is", required=True)
    flags.DEFINE_string("weights", None, "the file or folder to read; of a workdir, the run", required=True)
    flags.DEFINE_string(
        "out", None, "the folder to make; from a workdir, a .safetensors file or a folder for diffusers", required=True
    )
    flags.DEFINE_integer("heads", None, "attention heads, for a DiT of no published size", lower_bound=1)
    flags.DEFINE_integer("classes", None, "for a DiT: rows of its label table without the null class", lower_bound=1)
    flags.DEFINE_integer(
        "step",
        None,
        "into a run: steps the weights were trained for, default 0 or the file's own; from one: the checkpoint",
        lower_bound=0,
    )
    flags.DEFINE_enum(
        "item", None, ["ema", "params"], "weights to take from a run, or from a file of both; default ema"
    )
    launch(main)
