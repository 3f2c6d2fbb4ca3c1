"""A GPT in the style of Llama, and the parts of it that can be pruned.

Pre-norm RMSNorm, rotary position embeddings, grouped-query attention, SwiGLU, no biases. `forward`
takes all prunable widths from the shapes of the weights, so a pruned model needs no special code.

A *unit* is what a pruner removes as a whole: an FFN neuron, a KV head with the query heads that
share it, a channel of the residual stream, or a block. All but a block are slices of several
weights. A *group* is all units of one kind in one place, such as the neurons of a layer. Its
*width* is the number of its units. All layers are equally wide.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


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


@dataclass(frozen=True)
class Group:
    """All units of one kind in one place."""

    name: str  # such as "blocks.3.d_ff"
    kind: str  # a key of UNITS; also the field of GPTConfig that has the group's width
    width: int  # how many units
    # (name, dim) of each weight with slices. Cut along dim into `width` equal parts: part j is
    # of unit j. Empty: each unit is a whole module, an entry of the ModuleList `name`.
    members: tuple[tuple[str, int], ...] = ()


# Kind of unit -> (weight, dim) for each weight of a block in which it has a slice. An FFN neuron
# has a row of gate, a row of up and a column of down.
UNITS = {
    "d_ff": (("ffn.gate", 0), ("ffn.up", 0), ("ffn.down", 1)),
    "n_kv_head": (("attention.q", 0), ("attention.k", 0), ("attention.v", 0), ("attention.o", 1)),
    "d_model": (  # a channel of the stream; it is also in `norm` and the embeddings: see groups()
        ("attention_norm", 0), ("attention.q", 1), ("attention.k", 1), ("attention.v", 1),
        ("attention.o", 0), ("ffn_norm", 0), ("ffn.gate", 1), ("ffn.up", 1), ("ffn.down", 0),
    ),
    "n_layer": (),  # a block
}  # fmt: skip


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).type_as(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embeddings (2104.09864). Channel i is paired with i + head_dim / 2.

    x: (B, H, T, head_dim); cos, sin: (T, head_dim / 2).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


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
        q, k, v = (  # (B, heads, T, head_dim). Two views keep head_dim a constant for a compiler
            proj(x).view(-1, self.head_dim).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
            for proj in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos, sin).type_as(v), rotate(k, cos, sin).type_as(v)
        # Repeat the KV heads by hand: not every kernel takes enable_gqa=True
        k, v = (kv.repeat_interleave(self.queries_per_kv, dim=1) for kv in (k, v))
        if v.dtype == torch.bfloat16 and x.device.type == "cpu":
            # The same, written out: torch's kernel is slow here (results/speed.md)
            mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=v.dtype).triu(1)
            scores = q @ k.mT * self.head_dim**-0.5 + mask  # (B, n_head, T, T)
            y = scores.softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))  # (B, T, d_model)


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
        self.config = config  # as built; after a prune, see shape()
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.unembed = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.unembed.weight = self.embed.weight
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        angle = torch.arange(config.context_length).outer(config.rope_theta**-exponent)
        self.register_buffer("cos", angle.cos().float(), persistent=False)  # (T, head_dim / 2)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Normal, std 0.02, as in GPT-2. The projections that write to the residual stream, two in
        each layer, have 0.02 / sqrt(2 n_layer), so that its variance does not grow with depth."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                writes = name.endswith((".o", ".down"))
                std = 0.02 / (2 * self.config.n_layer) ** 0.5 if writes else 0.02
                nn.init.normal_(module.weight, std=std)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """tokens, targets: (B, T) token ids, T at most context_length.

        Returns the logits (B, T, vocab_size), or with targets their mean cross-entropy in nats, a
        float32 scalar.
        """
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        x = self.embed(tokens)  # (B, T, d_model)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.unembed(self.norm(x))  # (B, T, vocab_size)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def groups(self) -> list[Group]:
        """Every prunable group of the model as it is now."""

        def members(kind: str, i: int) -> tuple[tuple[str, int], ...]:
            return tuple((f"blocks.{i}.{name}.weight", dim) for name, dim in UNITS[kind])

        groups: list[Group] = []
        stream = [("unembed.weight", 1), ("norm.weight", 0)]
        stream += [] if self.config.tie_embeddings else [("embed.weight", 1)]  # tied: one matrix
        for i, block in enumerate(self.blocks):
            n_kv_head = block.attention.k.weight.shape[0] // block.attention.head_dim
            for kind, width in (("d_ff", block.ffn.gate.weight.shape[0]), ("n_kv_head", n_kv_head)):
                groups.append(Group(f"blocks.{i}.{kind}", kind, width, members(kind, i)))
            stream += members("d_model", i)
        groups.append(Group("stream", "d_model", self.norm.weight.shape[0], tuple(stream)))
        return [*groups, Group("blocks", "n_layer", len(self.blocks))]

    def shape(self) -> GPTConfig:
        """The configuration of a model with the present widths."""
        return replace(self.config, **{group.kind: group.width for group in self.groups()})
