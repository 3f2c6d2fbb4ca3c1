"""A GPT in the style of Llama, and the parts of it that can be pruned.

Pre-norm RMSNorm, rotary position embeddings, grouped-query attention, SwiGLU, no biases. `forward`
takes all prunable widths from the shapes of the weights, so a pruned model needs no special code.

Units, groups and widths are defined in prune.py. All layers have one width: plans, checkpoints and
the export rely on it.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

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


# Kind of unit -> where a block holds its units.
SLICES = {
    "d_ff": (Slice("ffn.gate.weight", 0), Slice("ffn.up.weight", 0), Slice("ffn.down.weight", 1)),
    "n_kv_head": (Slice("attention.q.weight", 0), Slice("attention.k.weight", 0),
                  Slice("attention.v.weight", 0), Slice("attention.o.weight", 1)),
    # A channel of the stream; it is also in `norm` and the embeddings: see groups(). To remove
    # a channel is not the same as to set it to zero: the norms take their mean over fewer channels
    "d_model": (
        Slice("attention_norm.weight", 0), Slice("attention.q.weight", 1),
        Slice("attention.k.weight", 1), Slice("attention.v.weight", 1),
        Slice("attention.o.weight", 0), Slice("ffn_norm.weight", 0),
        Slice("ffn.gate.weight", 1), Slice("ffn.up.weight", 1), Slice("ffn.down.weight", 0)),
}  # fmt: skip
KINDS = (*SLICES, "n_layer")  # every kind, by the name of its width in GPTConfig


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).type_as(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embeddings (2104.09864). Channel i is paired with i + head_dim / 2.

    x: (B, H, T, head_dim); cos, sin: (T, head_dim), whose two halves are the same.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1) * sin + x * cos  # a cos - b sin, b cos + a sin


class Attention(nn.Module):
    """Causal attention in which `queries_per_kv` query heads share each key and value head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        q_width, kv_width = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.head_dim, self.queries_per_kv = config.head_dim, config.queries_per_kv
        self.q = nn.Linear(config.d_model, q_width, bias=False)
        self.k = nn.Linear(config.d_model, kv_width, bias=False)
        self.v = nn.Linear(config.d_model, kv_width, bias=False)
        self.o = nn.Linear(q_width, config.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (split_heads(project(x), self.head_dim) for project in (self.q, self.k, self.v))
        y = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, self.queries_per_kv)
        return self.o(y.transpose(1, 2).flatten(2))  # (B, T, d_model)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, heads * head_dim) to (B, heads, T, head_dim)."""
    # Two views keep head_dim static for torch.compile, where the number of heads varies
    return x.view(-1, head_dim).view(*x.shape[:2], -1, head_dim).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, queries_per_kv: int) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, where no position sees a later one.

    q: (B, n_head, T, head_dim), and so is the result; k, v: (B, n_kv_head, T, head_dim).
    """
    q, k = q.type_as(v), k.type_as(v)  # rotation left them in float32
    # Query heads that share a KV head are neighbours, so they are one piece of q's weight (SLICES)
    if queries_per_kv > 1:  # by hand: not every kernel takes enable_gqa=True
        k, v = (x.repeat_interleave(queries_per_kv, dim=1) for x in (k, v))
    if v.dtype == torch.bfloat16 and v.device.type == "cpu":
        # The same, written out: torch's kernel is slow here
        T, head_dim = v.shape[2:]
        mask = torch.full((T, T), -torch.inf, dtype=v.dtype).triu(1)
        return (q @ k.mT * head_dim**-0.5 + mask).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class FeedForward(nn.Module):
    """SwiGLU (2002.05202). Neuron j is row j of gate, row j of up and column j of down."""

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
        with torch.device("cpu"):  # the same on every device, wherever the weights are
            exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
            angle = torch.arange(config.context_length).outer(config.rope_theta**-exponent)
        angle = torch.cat((angle, angle), dim=1)  # (T, head_dim)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        self.init_weights()

    @property
    def config(self) -> GPTConfig:
        """The shape of the model as it is now."""
        block = self.blocks[0]  # all layers are equally wide
        widths = {"d_ff": len(block.ffn.gate.weight), "d_model": len(self.norm.weight)}
        widths["n_kv_head"] = len(block.attention.k.weight) // self.initial_config.head_dim
        return replace(self.initial_config, **widths, n_layer=len(self.blocks))

    def init_weights(self) -> None:
        """Normal, std 0.02, as in GPT-2. The projections that write to the residual stream, two in
        each layer, have 0.02 / sqrt(2 n_layer), so that its variance does not grow with depth."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                writes = name.endswith((".o", ".down"))
                std = 0.02 / (2 * len(self.blocks)) ** 0.5 if writes else 0.02
                nn.init.normal_(module.weight, std=std)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """tokens: (B, T) token ids, T at most context_length. targets: the next tokens, (B, T), or
        a distribution over all tokens for each, (B, T, vocab_size).

        Returns logits (B, T, vocab_size), or with targets their mean cross-entropy (nats, float32).
        """
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        x = self.embed(tokens)  # (B, T, d_model)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(x, targets)

    def head(self, x: Tensor, targets: Tensor | None) -> Tensor:
        """What forward does after the blocks; a method, so that it can be compiled."""
        logits = self.unembed(self.norm(x))  # (B, T, vocab_size)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(0, 1))

    def groups(self) -> list[UnitGroup]:
        """Every prunable group of the model as it is now."""
        in_blocks = block_groups(self, "blocks", SLICES)  # d_model's are joined below
        stream = [Slice("unembed.weight", 1), Slice("norm.weight", 0)]  # a channel's slices
        if self.unembed.weight is not self.embed.weight:  # if they are tied, it is one matrix
            stream.append(Slice("embed.weight", 1))
        stream += [s for group in in_blocks if group.kind == "d_model" for s in group.slices]
        return [
            *(group for group in in_blocks if group.kind != "d_model"),
            UnitGroup("stream", "d_model", self.config.d_model, tuple(stream)),
            UnitGroup("blocks", "n_layer", len(self.blocks), ()),
        ]
