"""A GPT in the style of Llama, and the parts of it that can be pruned.

Pre-norm RMSNorm, rotary position embeddings, grouped-query attention, SwiGLU, no
biases. `forward` reads all prunable widths from the shapes of the weights, so a pruned
model needs no special code.

prune.py defines units, groups and widths. All layers have the same widths: schedules,
checkpoints and the export rely on it.
"""

import ctypes
import logging
import os
import platform
import zipfile
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from data.command import UserError
from prune import Slice, UnitGroup, block_groups


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model."""

    vocab_size: int
    context_length: int
    n_layer: int
    d_model: int
    head_dim: int
    queries_per_kv: int  # query heads for each KV head; pruning does not change it
    n_kv_head: int  # key-value heads in each layer
    d_ff: int  # FFN neurons in each layer
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def n_head(self) -> int:
        return self.n_kv_head * self.queries_per_kv

    def block_weights(self) -> int:
        """Weights in the matrices of all blocks."""
        q_width = self.n_head * self.head_dim
        kv_width = self.n_kv_head * self.head_dim
        columns = (
            2 * q_width + 2 * kv_width + 3 * self.d_ff
        )  # q, o; k, v; gate, up, down
        return self.n_layer * self.d_model * columns

    def n_params(self) -> int:
        """All parameters."""
        embeddings = self.vocab_size * self.d_model
        if not self.tie_embeddings:
            embeddings *= 2
        norms = (2 * self.n_layer + 1) * self.d_model
        return embeddings + norms + self.block_weights()

    def flops_per_token(self) -> int:
        """Training FLOPs for one token: a forward pass, and a backward pass of twice
        that.

        Each weight of a matrix costs 2 FLOPs in the forward pass, multiply and add.
        Each query head adds two products of T x T x head_dim, counted in full as
        `FlopCounterMode` does, although the causal mask hides half of them. Norms,
        rotary embeddings, softmax, `recompute` and the optimizer are left out, as is
        customary.
        """
        matrices = 2 * (self.block_weights() + self.vocab_size * self.d_model)
        attention_width = self.n_layer * self.n_head * self.head_dim
        attention = 2 * 2 * self.context_length * attention_width
        return 3 * (matrices + attention)


# Kind of unit -> where a block holds its units
SLICES = {
    "d_ff": (
        Slice("ffn.gate.weight", 0),
        Slice("ffn.up.weight", 0),
        Slice("ffn.down.weight", 1),
    ),
    "n_kv_head": (
        Slice("attention.q.weight", 0),
        Slice("attention.k.weight", 0),
        Slice("attention.v.weight", 0),
        Slice("attention.o.weight", 1),
    ),
    # A channel of the residual stream. groups() adds its slices outside of the blocks.
    # Removing a channel is not the same as zeroing it: RMSNorm then averages over
    # fewer.
    "d_model": (
        Slice("attention_norm.weight", 0),
        Slice("attention.q.weight", 1),
        Slice("attention.k.weight", 1),
        Slice("attention.v.weight", 1),
        Slice("attention.o.weight", 0),
        Slice("ffn_norm.weight", 0),
        Slice("ffn.gate.weight", 1),
        Slice("ffn.up.weight", 1),
        Slice("ffn.down.weight", 0),
    ),
}
KINDS = (*SLICES, "n_layer")  # every kind, by the name of its width in GPTConfig


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)
        return y.type_as(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embeddings (2104.09864). Channel i is paired with i +
    head_dim / 2.

    x: (B, H, T, head_dim). cos, sin: (T, head_dim), each with two equal halves.
    """
    a, b = x.chunk(2, dim=-1)
    rotated = torch.cat((-b, a), dim=-1)
    return rotated * sin + x * cos  # a cos - b sin, b cos + a sin


class Attention(nn.Module):
    """Causal attention in which `queries_per_kv` query heads share a key and a value
    head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        q_width = config.n_head * config.head_dim
        kv_width = config.n_kv_head * config.head_dim
        self.head_dim = config.head_dim
        self.queries_per_kv = config.queries_per_kv
        self.q = nn.Linear(config.d_model, q_width, bias=False)
        self.k = nn.Linear(config.d_model, kv_width, bias=False)
        self.v = nn.Linear(config.d_model, kv_width, bias=False)
        self.o = nn.Linear(q_width, config.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = split_heads(self.q(x), self.head_dim)  # (B, n_head, T, head_dim)
        k = split_heads(self.k(x), self.head_dim)  # (B, n_kv_head, T, head_dim)
        v = split_heads(self.v(x), self.head_dim)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        y = attend(q, k, v, self.queries_per_kv)
        return self.o(y.transpose(1, 2).flatten(2))  # (B, T, d_model)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, heads * head_dim) to (B, heads, T, head_dim)."""
    B, T, _ = x.shape
    # Two views keep head_dim static for torch.compile when the number of heads varies.
    return x.view(-1, head_dim).view(B, T, -1, head_dim).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, queries_per_kv: int) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, in which no position sees a later one.

    q and the result: (B, n_head, T, head_dim). k, v: (B, n_kv_head, T, head_dim).
    """
    q = q.type_as(v)  # rotation returns float32
    k = k.type_as(v)
    if queries_per_kv > 1 and v.is_cuda and v.dtype == torch.bfloat16:
        # FlashAttention reads a key head once for all of its query heads. The kernels
        # for float32 do not.
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if queries_per_kv > 1:
        k = k.repeat_interleave(queries_per_kv, dim=1)
        v = v.repeat_interleave(queries_per_kv, dim=1)
    if v.dtype == torch.bfloat16 and v.device.type == "cpu":
        # The same in the open, because torch's kernel is slow here
        T, head_dim = v.shape[2:]
        mask = torch.full((T, T), -torch.inf, dtype=v.dtype).triu(1)
        return (q @ k.mT * head_dim**-0.5 + mask).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class FeedForward(nn.Module):
    """SwiGLU (2002.05202). Neuron j is row j of gate, row j of up and column j of
    down."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.initial_config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.unembed = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.unembed.weight = self.embed.weight
        # Computed on the CPU, so that they are the same wherever the weights are
        with torch.device("cpu"):
            channels = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
            frequency = config.rope_theta ** -(channels / config.head_dim)
            angle = torch.arange(config.context_length).outer(frequency)
        angle = torch.cat((angle, angle), dim=1)  # (T, head_dim)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        self.init_weights()

    @property
    def config(self) -> GPTConfig:
        """The shape of the model as it is now."""
        block = self.blocks[0]  # all layers have the same widths
        kv_width = len(block.attention.k.weight)
        return replace(
            self.initial_config,
            n_layer=len(self.blocks),
            d_model=len(self.norm.weight),
            n_kv_head=kv_width // self.initial_config.head_dim,
            d_ff=len(block.ffn.gate.weight),
        )

    def init_weights(self) -> None:
        """Draw weights with a standard deviation of 0.02, as GPT-2 does.

        Two projections in each layer write to the residual stream. They are smaller by
        sqrt(2 n_layer), so that its variance does not grow with depth.
        """
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = 0.02
                if name.endswith((".o", ".down")):
                    std = 0.02 / (2 * len(self.blocks)) ** 0.5
                nn.init.normal_(module.weight, std=std)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocab_size); with targets, the mean cross-entropy (nats,
        float32).

        tokens: (B, T) token ids, T at most context_length. targets: the next tokens,
        (B, T), or a distribution over all tokens at each position, (B, T, vocab_size).
        """
        T = tokens.shape[1]
        cos = self.cos[:T]
        sin = self.sin[:T]
        x = self.embed(tokens)  # (B, T, d_model)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(x, targets)

    def head(self, x: Tensor, targets: Tensor | None) -> Tensor:
        """What forward does after the blocks. A method, so that it can be compiled."""
        logits = self.unembed(self.norm(x))  # (B, T, vocab_size)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(0, 1))

    def groups(self) -> list[UnitGroup]:
        """Every prunable group of the model as it is now."""
        groups = []
        stream = [Slice("unembed.weight", 1), Slice("norm.weight", 0)]
        if (
            self.unembed.weight is not self.embed.weight
        ):  # if they are tied, it is one matrix
            stream.append(Slice("embed.weight", 1))
        for group in block_groups(self, "blocks", SLICES):
            if group.kind == "d_model":
                stream += group.slices  # one group of channels spans all blocks
            else:
                groups.append(group)
        groups.append(
            UnitGroup("stream", "d_model", self.config.d_model, tuple(stream))
        )
        groups.append(UnitGroup("blocks", "n_layer", len(self.blocks), ()))
        return groups

    @classmethod
    def from_checkpoint(
        cls, checkpoint: "str | Path | dict", context_length: int = 0
    ) -> "GPT":
        """The model of a run's folder, a checkpoint.pt, or what load_checkpoint
        returned.

        context_length: another than the checkpoint's, if it is not 0. Raises UserError.
        """
        if not isinstance(checkpoint, dict):
            checkpoint = load_checkpoint(checkpoint)
        config = checkpoint["model_config"]
        if context_length:
            config = replace(config, context_length=context_length)
        model = cls(config)
        model.load_state_dict(checkpoint["model"])
        return model


def load_checkpoint(path: str | Path) -> dict:
    """What train.py saved, on the CPU; its `model_config` as a GPTConfig.

    path: a checkpoint.pt, or the folder of a run. Raises UserError if the checkpoint is
    missing, damaged or foreign. Loading runs no code of the file.
    """
    path = Path(path)
    if path.is_dir() and any(path.glob("*.safetensors")):
        advice = f"python -m tools.import_hf {path} --to out/NAME"
        raise UserError(f"{path}: a Hugging Face folder; first run: {advice}")
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load compares no checksums
        if damaged:
            raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["model_config"] = GPTConfig(**checkpoint["model_config"])
        with torch.device("meta"):  # no memory, only names and shapes to compare
            model = GPT(checkpoint["model_config"])
            model.load_state_dict(checkpoint["model"], assign=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises whatever a damaged file leads it to
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path}: damaged, or no checkpoint of train.py ({reason})"
        ) from error
    return checkpoint


# What the makers state for dense products in bfloat16, in FLOP/s
PEAK_FLOPS = {
    "a100": 312e12,
    "h100 pcie": 756e12,
    "h100": 989e12,
    "h200": 989e12,
    "rtx 4090": 165e12,
}


def peak_flops(device: torch.device) -> float:
    """The peak of a known GPU in bfloat16, in FLOP/s, or 0."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device).lower()
    for card, flops in PEAK_FLOPS.items():
        if f"{card} " in f"{name} " and "laptop" not in name:
            return flops
    return 0.0


def soft_targets(logits: Tensor, targets: Tensor, weight: float) -> Tensor:
    """Distributions to learn from a teacher (1503.02531), (B, T, vocab_size).

    They are the mean of the teacher's distribution, which counts `weight`, and the
    token that came. logits: the teacher's. targets: (B, T).
    """
    mixed = logits.float().softmax(-1) * weight
    rest = torch.full(targets.shape, 1 - weight, device=logits.device)
    return mixed.scatter_add_(-1, targets[..., None], rest[..., None])


# What follows changes the speed or the memory of training, not what the model computes.


def tune_cpu(step_flops: float) -> None:
    """Settings of a process that trains on a CPU. step_flops: of a step."""
    if platform.libc_ver()[0] == "glibc":
        # glibc returns each large tensor to the system and gets it back page by page,
        # which costs a third of a step. Let it keep what is freed (`man mallopt`).
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD
    # A tiny step runs as fast on one thread, and other programs do not slow it down.
    chosen_by_user = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys()
    if step_flops < 4e9 and not chosen_by_user:
        torch.set_num_threads(1)


def recompute_blocks(model: GPT, mode: str) -> None:
    """Let the backward pass compute the insides of blocks again, instead of keeping
    them.

    mode: "all" keeps only the inputs of blocks. "cheap" also keeps the results of
    matrix products and attention, which cost more to compute again than to keep.
    """
    options = {"use_reentrant": False, "preserve_rng_state": False}  # no random numbers
    if mode == "cheap":
        names = ["mm", "bmm"]
        for kernel in ("flash", "cudnn", "efficient"):
            names.append(f"_scaled_dot_product_{kernel}_attention")
        names.append("_scaled_dot_product_flash_attention_for_cpu")
        keep = [getattr(torch.ops.aten, name).default for name in names]
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep)
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(
            "ERROR"
        )  # false alarm
    for block in model.blocks:
        block.forward = partial(recompute, block.forward, **options)


def compile_blocks(model: GPT, kinds: Container[str]) -> None:
    """Compile the blocks and the head for training.

    One graph serves all blocks, because torch looks it up by their code. It also serves
    all widths of these kinds, so a prune compiles nothing. In eval mode, the model is
    eager, because its batches have other shapes. `model.compiled = False` switches it
    off.
    """
    torch._dynamo.config.force_parameter_static_shapes = False
    torch._dynamo.config.force_nn_module_property_static_shapes = False
    torch._dynamo.config.optimize_ddp = (
        False  # it would cut a graph where a bucket ends
    )

    def compiled(module: nn.Module, eager: Callable, slices: list[Slice]) -> Callable:
        fast = torch.compile(eager)

        def forward(x: Tensor, *others: Tensor) -> Tensor:
            if not (model.compiled and module.training):
                return eager(x, *others)
            for s in slices:  # in each call, because a prune makes new parameters
                torch._dynamo.maybe_mark_dynamic(module.get_parameter(s.name), s.dim)
            if "d_model" in kinds:
                torch._dynamo.maybe_mark_dynamic(x, 2)
            try:
                return fast(x, *others)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler leads to
                model.compiled = False
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"compiling failed, so the run goes on without it: {reason:.200}")
                return eager(x, *others)

        return forward

    model.compiled = True
    in_block = []
    in_head = []
    for kind, slices in SLICES.items():
        if kind in kinds:
            in_block += slices
    if "d_model" in kinds:
        in_head = [Slice("norm.weight", 0), Slice("unembed.weight", 1)]
    for block in model.blocks:
        block.forward = compiled(block, block.forward, in_block)
    model.head = compiled(model, model.head, in_head)
