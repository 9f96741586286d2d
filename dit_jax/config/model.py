"""Settings of the model, its noising process and its autoencoder."""

from dataclasses import dataclass

from dit_jax.error import UsageError, at_least, choice, in_range, number, shown

ENCODERS = ("clip", "t5", "bert")  # kinds of frozen encoders of text


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a DiT."""

    depth: int = 12  # transformer blocks
    width: int = 384  # features of a token; a multiple of 4 and of `heads`
    heads: int = 6  # attention heads
    patch: int = 2  # side of the square of one token
    input_size: int = 32  # side of the input, in latent pixels for latent diffusion, else pixels; a multiple of `patch`
    channels: int = 4  # of the input: 4 for SD-VAE latents, else as in the images
    classes: int = 1000  # labels without the null class; 0 = images without labels
    text: str = ""  # how captions are read: "" (none) | bytes | words | clip | t5 | bert (frozen encoders)
    text_length: int = 64  # tokens of a caption, of bytes: bytes, of words: words; longer ones are cut
    text_depth: int = 0  # blocks of self-attention over the caption's tokens, trained with the model
    text_encoder: str = ""  # clip, t5, bert: folder written by `convert`, such as --source=t5
    text_width: int = 0  # clip, t5, bert: features of a state; 0 = as the encoder has, set when a run begins
    text_sha256: str = ""  # clip, t5, bert: checksums of encoder and tokenizer, set when a run begins
    null: str = "empty"  # of captions, for dropout and guidance: empty (the empty caption) | learned (a trained table)
    superres: int = 0  # factor from a low-resolution image, the condition, to the image (super-resolution); 0 = none
    mlp_ratio: int = 4  # hidden features of the MLP, in multiples of `width`
    target: str = ""  # which blocks read a flow map's target time: "" (none) | all (beside t) | later (the last third)
    time_scale: float = 1.0  # factor of t in its sinusoids; 0.03 gives smooth derivatives in t, for few steps
    learn_sigma: bool = True  # two outputs per channel: eps and the learned-range variance
    conditioning: str = "adaln_zero"  # adaln_zero | adaln | in_context | cross_attention | adaln_cross | dual_stream
    positions: str = "sincos"  # of the patches: sincos or learned (added to them) | rope (rotates queries and keys)
    block: str = "dit"  # layers of a block: dit (LayerNorm, GELU) | llama (RMSNorm, SwiGLU of about as many parameters)
    qk_norm: bool = False  # normalise queries and keys
    dtype: str = "float32"  # float32 | bfloat16, of the compute; parameters are always float32
    attention: str = "auto"  # auto | xla | cudnn
    remat: str = "none"  # recomputed in the backward pass: none | dots (all but most matrix products) | full
    unroll: int = 1  # blocks per iteration of the layer scan; `depth` = fully unrolled

    def __post_init__(self):
        at_least(1, self, "depth", "width", "heads", "patch", "input_size", "channels", "mlp_ratio", "unroll")
        at_least(1, self, "text_length")
        at_least(0, self, "classes", "text_width", "text_depth")
        choice("model.text", self.text, ("", "bytes", "words", *ENCODERS))
        choice("model.null", self.null, ("empty", "learned") if self.text else ("empty",))
        for name in ("text_encoder", "text_width", "text_sha256"):
            if not self.encoded and (found := getattr(self, name)):
                expected = f"expected none with model.text = {self.text!r}, or {', '.join(ENCODERS)} as model.text"
                raise UsageError(f"model.{name}: found {shown(found)}, {expected}")
        if self.text_depth and not self.text:
            raise UsageError(f"model.text_depth: found {self.text_depth}, expected 0 for a model without captions")
        kinds, of_text = ("in_context", "cross_attention", "adaln", "adaln_zero"), ("adaln_cross", "dual_stream")
        choice("model.conditioning", self.conditioning, (*kinds, *of_text))
        if bool(self.text) and self.conditioning not in ("in_context", *of_text):
            expected = "expected in_context, adaln_cross or dual_stream for a model of captions (model.text)"
            raise UsageError(f"model.conditioning: found {self.conditioning!r}, {expected}")
        if self.conditioning in of_text and not self.text:
            expected = "expected 'bytes', 'words' or an encoder"
            raise UsageError(f"model.text: found '', {expected} for model.conditioning = {self.conditioning!r}")
        if self.superres and (self.superres < 2 or self.input_size % self.superres):
            expected = f"expected 0, or a divisor of model.input_size = {self.input_size} that is at least 2"
            raise UsageError(f"model.superres: found {self.superres}, {expected}")
        in_range("model.time_scale", self.time_scale, 1e-4, 1.0)
        choice("model.target", self.target, ("", "all", "later") if self.adaptive else ("",))
        choice("model.positions", self.positions, ("sincos", "learned", "rope"))
        choice("model.block", self.block, ("dit", "llama"))
        choice("model.dtype", self.dtype, ("float32", "bfloat16"))
        choice("model.attention", self.attention, ("auto", "xla", "cudnn"))
        choice("model.remat", self.remat, ("none", "dots", "full"))
        for name, of in (("heads", "width"), ("patch", "input_size"), ("unroll", "depth")):
            if getattr(self, of) % (found := getattr(self, name)):
                raise UsageError(f"model.{name}: found {found}, expected a divisor of model.{of} = {getattr(self, of)}")
        if self.width % 4:
            raise UsageError(
                f"model.width: found {self.width}, expected a multiple of 4 (two sines and two cosines a position)"
            )
        if self.positions == "rope" and (head := self.width // self.heads) % 4:
            expected = "expected heads whose width is a multiple of 4 (pairs for rows and for columns)"
            raise UsageError(f"model.heads: found {self.heads}, so {head} features a head; with rope, {expected}")

    @property
    def unrolled(self) -> bool:
        """Whether the layers are in no loop."""
        return 1 < self.unroll == self.depth

    @property
    def tokens(self) -> int:
        """Tokens per image."""
        return (self.input_size // self.patch) ** 2

    @property
    def caption_tokens(self) -> int:
        """Tokens of the caption of an image; 0 for a model without captions."""
        return self.text_length if self.text else 0

    @property
    def earlier(self) -> int:
        """Blocks that read t, of a model whose later ones read the target time: two thirds (2510.24474), at least one."""
        return max(1, 2 * self.depth // 3)

    @property
    def encoded(self) -> bool:
        """Whether captions are states of a frozen encoder."""
        return self.text in ENCODERS

    @property
    def state_width(self) -> int:
        """Features of an encoder's states. Raises UsageError while they are unknown."""
        if not self.text_width:
            raise UsageError(
                f"model.text_width: found 0, expected the features of a state of {self.text}, or model.text_encoder, a "
                f"folder here that `python -m dit_jax.convert --source={self.text}` wrote"
            )
        return self.text_width

    @property
    def hidden(self) -> int:
        """Features between the MLP's matrices; of SwiGLU, which has 3, two thirds of GELU's (Shazeer 2020, arXiv 2002.05202, section 3),
        to the nearest multiple of 16."""
        hidden = self.mlp_ratio * self.width
        return 16 * max(1, round(hidden / 24)) if self.block == "llama" else hidden

    @property
    def adaptive(self) -> bool:
        """Whether the condition gives the norms' shift and scale (adaLN); else it is a sequence of tokens."""
        return self.conditioning in ("adaln", "adaln_zero", "adaln_cross", "dual_stream")

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learn_sigma else 1)


@dataclass(frozen=True)
class DiffusionConfig:
    """Noising process and loss. `ddpm`: discrete, eps-prediction; `flow`: rectified flow, whose loss is that of the velocity."""

    process: str = "ddpm"  # ddpm | flow
    schedule: str = "linear"  # ddpm: linear | cosine
    timesteps: int = 1000  # ddpm: length of the discrete chain
    prediction: str = "velocity"  # flow: output of the network: velocity | x (the clean image)
    shift: float = 1.0  # flow: factor of t / (1 - t), in training and in sampling; > 1 = more noise, for large images
    time_law: str = "uniform"  # flow: distribution of t in training: uniform | logit_normal
    logit_mean: float = 0.0  # flow, logit_normal: mean of logit(t)
    logit_std: float = 1.0  # flow, logit_normal: standard deviation of logit(t)

    def __post_init__(self):
        choice("diffusion.process", self.process, ("ddpm", "flow"))
        choice("diffusion.schedule", self.schedule, ("linear", "cosine"))
        choice("diffusion.time_law", self.time_law, ("uniform", "logit_normal"))
        choice("diffusion.prediction", self.prediction, ("velocity", "x"))
        in_range("diffusion.shift", self.shift, 1e-3, 1e3)
        for name in ("prediction", "shift") if self.process == "ddpm" else ():
            if (found := getattr(self, name)) != (expected := getattr(DiffusionConfig, name)):
                raise UsageError(
                    f"diffusion.{name}: found {found!r}, expected {expected!r} unless diffusion.process is 'flow'"
                )
        in_range("diffusion.timesteps", self.timesteps, 2)
        in_range("diffusion.logit_std", self.logit_std, 1e-3)


@dataclass(frozen=True)
class AutoencoderConfig:
    """Autoencoder of latent diffusion. The model's input is (z - shift) scale for a latent z."""

    folder: str = ""  # written by `convert --source=sd-vae`; "" = the model's output is the image
    scale: tuple = (0.18215,)  # one number, or one per channel (whitening)
    shift: tuple = (0.0,)  # one number, or one per channel

    def __post_init__(self):
        for name in ("scale", "shift"):
            found = getattr(self, name)
            if not found or not all(map(number, found)) or (name == "scale" and min(found) <= 0):
                raise UsageError(
                    f"autoencoder.{name}: found {shown(found)}, expected a tuple of numbers, one or one per channel"
                )
