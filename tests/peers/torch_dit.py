"""A strong DiT in PyTorch, written from the papers, to time beside ours and to check ours against.

    python -m dit_jax.bench --peer=tests/peers/torch_dit.py

It computes what dit_jax computes with the published settings: adaLN-Zero (Peebles & Xie 2023, section 3.2 and Figure 3), the chain
of Ho et al. 2020 with the hybrid loss of Nichol & Dhariwal 2021 (eps plus the variational term of a learned variance), AdamW, an
EMA of the weights, guided ancestral sampling. Parameters, moments and EMA are float32; `model.dtype` is that of the compute, norms
and loss are float32. Attention is `scaled_dot_product_attention`; loss and sampling step go through `torch.compile` where that
works; AdamW is the fused one. Unlike ours its training step computes no norms of gradients and weights and has no guard against bad
steps. Images are (b, h, w, c), as ours.
"""

import copy
import functools
import math
import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dit_jax.bench.peer import Side
from dit_jax.config import Config, ModelConfig
from dit_jax.error import JobError, UsageError

EXPECTED = {  # what is written here, of the project's many choices
    "model.conditioning": "adaln_zero", "model.qk_norm": False, "model.learn_sigma": True, "diffusion.process": "ddpm",
    "diffusion.schedule": "linear", "diffusion.timesteps": 1000, "optim.schedule": "constant", "optim.warmup_steps": 0, "optim.clip": 0.0,
    "optim.accumulate": 1, "optim.ema": "constant", "sample.sampler": "ddpm", "sample.spacing": "linspace",
    "sample.interval": (0.0, 1.0), "sample.guide": "", "sample.rescale": 0.0, "sample.reuse": 1.0,
    "sample.quantize": "",
}  # fmt: skip


class Linear(nn.Linear):
    """Float32 weights, the product in the dtype of what comes in."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def modulated(x, shift, scale):
    """adaLN: a layer norm without weights of its own, then scale and shift (b, d) from the condition."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """x (b, n, d), c (b, d) -> x: attention and MLP, each between an adaptive norm and a gate."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        d, self.heads = cfg.width, cfg.heads
        self.modulation = Linear(d, 6 * d)
        self.qkv, self.proj = Linear(d, 3 * d), Linear(d, d)
        self.fc1, self.fc2 = Linear(d, cfg.mlp_ratio * d), Linear(cfg.mlp_ratio * d, d)

    def attend(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c)).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attend(modulated(x, shift1, scale1))
        h = F.gelu(self.fc1(modulated(x, shift2, scale2)), approximate="tanh")
        return x + gate2[:, None] * self.fc2(h)


class DiT(nn.Module):
    """x (b, h, w, c), step numbers k (b,), labels (b,) -> (b, h, w, 2c) float32: eps and the share of the learned variance."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg, self.dtype, self.recompute = cfg, getattr(torch, cfg.dtype), False
        d, p, side = cfg.width, cfg.patch, cfg.input_size // cfg.patch
        self.patches = Linear(p * p * cfg.channels, d)
        self.time1, self.time2 = Linear(256, d), Linear(d, d)
        self.labels = nn.Embedding(cfg.classes + 1, d)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.modulation, self.out = Linear(d, 2 * d), Linear(d, p * p * cfg.out_channels)
        self.register_buffer("positions", grid_positions(side, d), persistent=False)
        self.register_buffer("frequencies", torch.exp(-math.log(1e4) * torch.arange(128) / 128), persistent=False)

    def condition(self, k, labels):
        angles = k.float()[:, None] * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.dtype)
        return self.time2(F.silu(self.time1(waves))) + self.labels(labels).to(self.dtype)

    def forward(self, x, k, labels):
        b, side, _, channels = x.shape
        p = self.cfg.patch
        n = side // p
        h = x.to(self.dtype).view(b, n, p, n, p, channels).transpose(2, 3).reshape(b, n * n, p * p * channels)
        h, c = self.patches(h) + self.positions.to(self.dtype), self.condition(k, labels)
        for block in self.blocks:
            h = checkpoint(block, h, c, use_reentrant=False) if self.recompute and self.training else block(h, c)
        shift, scale = self.modulation(F.silu(c)).chunk(2, dim=-1)
        h = self.out(modulated(h, shift, scale))
        return h.view(b, n, n, p, p, 2 * channels).transpose(2, 3).reshape(b, side, side, 2 * channels).float()


def grid_positions(side: int, d: int) -> torch.Tensor:
    """(n, d): sines and cosines of a token's column, then those of its row; 1e4^(-i / (d/4)) are the frequencies."""
    frequencies = 1e4 ** (-torch.arange(d // 4, dtype=torch.float64) / (d // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    columns, rows = waves[None].expand(side, -1, -1), waves[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(side * side, d).float()


def matched(model: DiT, tree: dict) -> Iterator[tuple[str, np.ndarray, torch.Tensor]]:
    """(name, ours, the peer's) for every parameter; ours out of a tree like our parameters, in the peer's shape."""
    linears = [("patch_embedding", None, model.patches), ("time_embedding/fc1", None, model.time1)]
    linears += [("time_embedding/fc2", None, model.time2), ("output/modulation/linear", None, model.modulation)]
    linears += [("output/linear", None, model.out)]
    for i, block in enumerate(model.blocks):
        inside = {"modulation/linear": block.modulation, "attention/qkv": block.qkv, "attention/proj": block.proj}
        inside |= {"mlp/fc1": block.fc1, "mlp/fc2": block.fc2}
        linears += [(f"blocks/{name}", i, linear) for name, linear in inside.items()]
    for path, layer, linear in linears:
        leaves = functools.reduce(dict.__getitem__, path.split("/"), tree)
        kernel, bias = (np.asarray(leaves[name]) for name in ("kernel", "bias"))
        if layer is not None:
            kernel, bias, path = kernel[layer], bias[layer], f"{path}[{layer}]"
        rows, columns = linear.weight.shape
        yield f"{path}/kernel", kernel.reshape(columns, rows).T, linear.weight
        yield f"{path}/bias", bias.reshape(rows), linear.bias
    yield "label_embedding", np.asarray(tree["label_embedding"]["table"]["embedding"]), model.labels.weight


def make_model(cfg: ModelConfig, params: dict, device: str) -> DiT:
    """The peer with our weights."""
    model = DiT(cfg)
    with torch.no_grad():
        for _, ours, theirs in matched(model, params):
            theirs.copy_(torch.from_numpy(np.array(ours)))
    return model.to(device)


def per_image(x):
    return x.mean(dim=(1, 2, 3))


BETA = np.linspace(1e-4, 2e-2, 1000)
BAR = np.cumprod(1 - BETA)  # the signal's share of the variance after each step


class Chain(nn.Module):
    """Tables of the chain of 1000 steps, as buffers: step k is 0 to 999."""

    def __init__(self):
        super().__init__()
        beta, bar = BETA, BAR
        before = np.append(1.0, bar[:-1])
        posterior = beta * (1 - before) / (1 - bar)
        posterior[0] = posterior[1]  # of the first step it is zero
        tables = {
            "signal": np.sqrt(bar), "noise": np.sqrt(1 - bar), "log_beta": np.log(beta), "log_posterior": np.log(posterior),
            "from_clean": np.sqrt(before) * beta / (1 - bar), "from_noisy": np.sqrt(1 - beta) * (1 - before) / (1 - bar),
        }  # fmt: skip
        for name, values in tables.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))

    def at(self, k):
        """The tables' entries at k (b,), each (b, 1, 1, 1)."""
        return {name: table[k][:, None, None, None] for name, table in self.named_buffers()}

    def losses(self, model: DiT, x, labels, k, eps):
        """(b,): squared error of eps, plus the variational term in bits per dimension, which trains the variance only."""
        c = self.at(k)
        noisy = c["signal"] * x + c["noise"] * eps
        eps_hat, share = model(noisy, k, labels).chunk(2, dim=-1)
        return per_image((eps_hat - eps) ** 2) + self.bound(c, x, noisy, eps_hat.detach(), (share + 1) / 2, k)

    def bound(self, c, x, noisy, eps_hat, share, k):
        """A term of the variational bound: a KL of two Gaussians, or at the first step the NLL of 256 levels."""
        clean = (noisy - c["noise"] * eps_hat) / c["signal"]
        mean = c["from_clean"] * x + c["from_noisy"] * noisy
        guess = c["from_clean"] * clean + c["from_noisy"] * noisy
        log_variance = share * c["log_beta"] + (1 - share) * c["log_posterior"]
        gap = c["log_posterior"] - log_variance
        kl = 0.5 * (gap.exp() - 1 - gap + (mean - guess) ** 2 * (-log_variance).exp())
        sharpness = (-0.5 * log_variance).exp()
        above = torch.special.ndtr((x - guess + 1 / 255) * sharpness).where(x <= 0.999, 1.0)
        below = torch.special.ndtr((x - guess - 1 / 255) * sharpness).where(x >= -0.999, 0.0)
        nll = -(above - below).clamp_min(1e-12).log()
        return per_image(nll.where((k == 0)[:, None, None, None], kl)) / math.log(2)


def adamw(cfg: Config, model: DiT) -> torch.optim.AdamW:
    o = cfg.optim
    return torch.optim.AdamW(
        model.parameters(), o.learning_rate, (o.b1, o.b2), o.eps, weight_decay=o.weight_decay, fused=True
    )


@torch.no_grad()
def update_ema(ema: DiT, model: DiT, decay: float) -> None:
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def update(cfg: Config, model: DiT, ema: DiT, optimizer, loss) -> None:
    """One update of weights and EMA by a loss."""
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    update_ema(ema, model, cfg.optim.ema_decay)


def respaced(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of `count` equally spaced steps, noisiest first: (step numbers, rows of a sampling step's seven constants)."""
    kept = np.round(np.linspace(999 if count == 1 else 0, 999, count)).astype(int)[::-1]
    here = BAR[kept]
    after = np.append(BAR[kept[1:]], 1.0)
    kept_signal = here / after
    beta, gone = 1 - kept_signal, 1 - here
    with np.errstate(divide="ignore"):
        small = np.log(np.maximum(beta * (1 - after) / gone, 1e-20))
    rows = [np.sqrt(here), np.sqrt(gone), np.sqrt(after) * beta / gone, np.sqrt(kept_signal) * (1 - after) / gone]
    return kept.copy(), np.stack([*rows, np.log(beta), small, after < 1], axis=1)


def guided_step(model: DiT, guidance: float, channels: int, x, k, labels, constants, noise):
    """From x (b, h, w, c) at step k, a scalar, to the next one; both halves of the guidance in one batch."""
    signal, sigma, from_clean, from_noisy, large, small, noisy = constants.unbind()
    k = k.expand(len(labels))
    if guidance == 1.0:
        eps, share = model(x, k, labels).chunk(2, dim=-1)
    else:
        both = torch.cat([labels, torch.full_like(labels, model.cfg.classes)])
        with_class, without = model(torch.cat([x, x]), torch.cat([k, k]), both).chunk(2)
        eps, share = with_class.chunk(2, dim=-1)
        free = without[..., :channels]
        eps = torch.cat([free + guidance * (eps[..., :channels] - free), eps[..., channels:]], dim=-1)
    share = (share + 1) / 2
    log_variance = share * large + (1 - share) * small
    mean = from_clean * (x - sigma * eps) / signal + from_noisy * x
    return mean + noisy * (0.5 * log_variance).exp() * noise


def walk(step: Callable, x, labels, numbers, constants, draw: Callable):
    """Images from noise x; `draw(i)` is the noise that step i adds."""
    for i in range(len(numbers)):
        x = step(x, numbers[i], labels, constants[i], draw(i))
    return x


def make_step(cfg: Config, model: DiT, device: str) -> tuple[Callable, torch.Tensor, torch.Tensor]:
    """(step, its numbers, its constants) of `cfg.sample`."""
    numbers, constants = respaced(cfg.sample.steps)
    guided = cfg.model.channels if cfg.sample.channels == "all" else min(3, cfg.model.channels)

    def step(x, k, labels, constants, noise):
        return guided_step(model, cfg.sample.guidance, guided, x, k, labels, constants, noise)

    return step, torch.tensor(numbers, device=device), torch.tensor(constants, dtype=torch.float32, device=device)


# What the benchmark calls.


def check(cfg: Config, platform: str) -> str:
    """The device, as PyTorch names it. Raises UsageError on a config or a device that this peer does not know."""
    found = {key: getattr(getattr(cfg, key.split(".")[0]), key.split(".")[1]) for key in EXPECTED}
    other = [
        f"{key}: found {found[key]!r}, expected {EXPECTED[key]!r}" for key in EXPECTED if found[key] != EXPECTED[key]
    ]
    if other:
        raise UsageError(f"--peer: {'; '.join(other)}: the PyTorch peer knows nothing else")
    if platform == "gpu" and not torch.cuda.is_available():
        raise UsageError(
            f"--peer: PyTorch {torch.__version__} sees no GPU, while JAX computes on one; install its CUDA build"
        )
    if platform not in ("cpu", "gpu"):
        raise UsageError(f"--peer: found {platform}, expected cpu or gpu, where PyTorch computes too")
    return "cuda" if platform == "gpu" else "cpu"


def prepare(device: str, threads: int) -> None:
    """As many threads as JAX has; float32 products as coarse as JAX's default on a GPU."""
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def first_that_works(ways: dict[str, Callable], try_it: Callable, device: str) -> tuple[Callable, float, dict]:
    """(function, seconds of its first call, which it is and why those before it did not work): `ways` in their order."""
    failed = {}
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        failed = {"torch.compile": "TORCH_COMPILE_DISABLE is set"}
        ways = {name: make for name, make in ways.items() if name.startswith("eager")}
    for name, make in ways.items():
        start = time.perf_counter()
        try:
            function = make()
            try_it(function)
            wait(device)
            return function, time.perf_counter() - start, {"way": name, "did_not_work": failed}
        except RuntimeError as error:  # PyTorch's own: out of memory, no C++ compiler, what cannot be compiled
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
    raise JobError(f"--peer: PyTorch computes it in no way: {failed}")


def wait(device: str) -> None:
    """Until the device has computed what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def side(run: Callable, first: float, device: str, about: dict) -> Side:
    about |= {"name": "torch", "version": torch.__version__}
    about |= {"threads": torch.get_num_threads()} if device == "cpu" else {"cuda": torch.version.cuda}

    def several(n: int) -> None:
        for _ in range(n):
            run()
        wait(device)

    def memory():
        if device == "cuda":
            return torch.cuda.max_memory_allocated(), "torch.cuda.max_memory_allocated"
        return None, "not measured: PyTorch does not count it on a CPU"

    return Side(several, first, memory, lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"], about)


def make_trainer(cfg: Config, params: dict, batch: dict, platform: str, threads: int) -> Side:
    """The whole training step on one batch (`image` (b, h, w, c), `cond` with `label` (b,)) that lies on the device; times,
    noise and dropped labels are drawn in every step, as in ours."""
    device = check(cfg, platform)
    prepare(device, threads)
    model, chain = make_model(cfg.model, params, device).train(), Chain().to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    x, labels = (torch.from_numpy(np.array(a)).to(device) for a in (batch["image"], batch["cond"]["label"]))
    labels, optimizer = labels.long(), adamw(cfg, model)

    def mean_loss(x, labels, k, eps):
        return chain.losses(model, x, labels, k, eps).mean()

    def draw():
        k = torch.randint(1000, labels.shape, device=device)
        dropped = torch.rand(labels.shape, device=device) < cfg.train.cond_dropout
        return x, labels.where(~dropped, cfg.model.classes), k, torch.randn_like(x)

    def recomputing(on: bool, loss: Callable) -> Callable:
        model.recompute = on
        return loss

    def try_it(loss):
        loss(*draw()).backward()
        optimizer.zero_grad(set_to_none=True)

    ways = {
        "torch.compile": lambda: recomputing(False, torch.compile(mean_loss)),
        "torch.compile, blocks recomputed": lambda: recomputing(True, torch.compile(mean_loss)),
        "eager": lambda: recomputing(False, mean_loss),
        "eager, blocks recomputed": lambda: recomputing(True, mean_loss),
    }
    loss, first, about = first_that_works(ways, try_it, device)
    return side(lambda: update(cfg, model, ema, optimizer, loss(*draw())), first, device, about)


def make_sampler(cfg: Config, params: dict, rows: int, platform: str, threads: int) -> Side:
    """One batch of `rows` images by `cfg.sample`, labels drawn at random; the weights are in the compute's dtype beforehand."""
    device = check(cfg, platform)
    prepare(device, threads)
    model = make_model(cfg.model, params, device).eval().requires_grad_(False)
    for weights in model.parameters():
        weights.data = weights.data.to(model.dtype)
    step, numbers, constants = make_step(cfg, model, device)
    shape = (rows, cfg.model.input_size, cfg.model.input_size, cfg.model.channels)

    @torch.inference_mode()
    def run(step):
        labels = torch.randint(cfg.model.classes, (rows,), device=device)
        return walk(step, noise(0), labels, numbers, constants, noise)

    def noise(i: int):
        return torch.randn(shape, device=device)

    ways = {"torch.compile": lambda: torch.compile(step), "eager": lambda: step}
    chosen, first, about = first_that_works(ways, run, device)
    return side(lambda: run(chosen), first, device, about)
