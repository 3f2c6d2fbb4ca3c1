"""What a GPT is: the Llama computation, written so that any part of it can be made narrower.

Pre-norm RMSNorm, rotary position embeddings, grouped-query attention, SwiGLU, no biases. `forward`
reads every size from the weights, so a pruned model needs no special code. `GPT.groups` names the
units that a pruner may remove: a unit is the set of slices that live and die together.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """The shape of a model. Lists hold one width per layer, so any pruned shape can be rebuilt."""

    vocab_size: int
    context_length: int
    d_model: int
    head_dim: int
    queries_per_kv: int  # query heads that share one KV head: the size of a KV group
    n_kv_head: list[int]  # KV groups, per layer
    d_ff: list[int]  # FFN neurons, per layer
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def n_layer(self) -> int:
        return len(self.d_ff)

    def n_parameters(self) -> int:
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        norms = (2 * self.n_layer + 1) * self.d_model
        return embeddings + norms + self._block_weights()

    def flops_per_token(self) -> int:
        """FLOPs of one training token: forward plus backward, and the backward counts twice.

        Each weight of a matrix costs 2 FLOPs forward (multiply, add). Attention adds two products
        of (T, head_dim) with (T, T) per query head, counted in full as `FlopCounterMode` does,
        although half of it is masked. Norms, rotary embeddings and softmax are left out, as is
        customary.
        """
        query_heads = sum(self.n_kv_head) * self.queries_per_kv
        attention = 2 * 2 * self.context_length * self.head_dim * query_heads
        weights = self._block_weights() + self.vocab_size * self.d_model
        return 3 * (2 * weights + attention)

    def _block_weights(self) -> int:
        per_kv_group = (2 * self.queries_per_kv + 2) * self.head_dim * self.d_model  # q, o; k, v
        per_neuron = 3 * self.d_model  # gate, up, down
        return sum(self.n_kv_head) * per_kv_group + sum(self.d_ff) * per_neuron


@dataclass(frozen=True)
class Group:
    """Prunable units of one layer. Unit j is the j-th of `width` equal slices of every member.

    `members` are (module name, dim): the slice runs along dim 0 (outputs) or 1 (inputs) of that
    module's weight. The last member is the one that reads the units' activations.
    """

    layer: int
    kind: str  # "d_ff" or "n_kv_head": the width it changes
    width: int
    members: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return f"blocks.{self.layer}.{self.kind}"


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).type_as(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (2104.09864), half-split: channel i is paired with i + head_dim / 2.

    x: (B, H, T, head_dim); cos, sin: (T, head_dim / 2).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Causal attention in which `queries_per_kv` query heads share each key and value head."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        kv_width = config.n_kv_head[layer] * config.head_dim
        q_width = kv_width * config.queries_per_kv
        self.head_dim = config.head_dim
        self.q = nn.Linear(config.d_model, q_width, bias=False)
        self.k = nn.Linear(config.d_model, kv_width, bias=False)
        self.v = nn.Linear(config.d_model, kv_width, bias=False)
        self.o = nn.Linear(q_width, config.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: dict | None = None) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, head_dim)
            for proj in (self.q, self.k, self.v)
        )
        # On a CPU, torch's attention is five times slower in bfloat16 than in float32 (without AMX)
        on_cpu = x.device.type == "cpu"
        dtype = torch.promote_types(v.dtype, torch.float32) if on_cpu else v.dtype
        q, k, v = rotate(q, cos, sin).to(dtype), rotate(k, cos, sin).to(dtype), v.to(dtype)
        if cache is not None:
            if self in cache:
                k, v = (torch.cat(pair, dim=2) for pair in zip(cache[self], (k, v)))
            cache[self] = k, v
        # Spelled out: not every fused kernel of every torch takes fewer KV heads than query heads.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        T, seen = q.shape[2], k.shape[2]
        mask = None  # is_causal counts from the first key, so it is right where all keys are new
        if seen > T:
            mask = torch.ones(T, seen, dtype=torch.bool, device=x.device).tril(seen - T)
        with torch.autocast(x.device.type, enabled=False):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o(y.transpose(1, 2).flatten(2))  # (B, T, d_model)


class FeedForward(nn.Module):
    """SwiGLU (2002.05202). Neuron j is row j of gate, row j of up and column j of down."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_ff[layer], bias=False)
        self.up = nn.Linear(config.d_model, config.d_ff[layer], bias=False)
        self.down = nn.Linear(config.d_ff[layer], config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = FeedForward(config, layer)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: dict | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, cache)
        return x + self.ffn(self.ffn_norm(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # each block's activations in the backward pass, instead of storing
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.unembed = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.unembed.weight = self.embed.weight
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        angle = torch.arange(config.context_length).outer(
            config.rope_theta**-half
        )  # (T, head_dim/2)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Normal, std 0.02; the two projections that write to the residual stream are scaled down
        by the square root of their number, so that the stream's variance does not grow with depth
        (GPT-2).
        """
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                writes = name.endswith((".o", ".down"))
                std = 0.02 / (2 * self.config.n_layer) ** 0.5 if writes else 0.02
                nn.init.normal_(module.weight, std=std)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: dict | None = None
    ) -> Tensor:
        """tokens, targets: (B, T) token ids, T at most context_length.

        Returns the logits (B, T, vocab_size), or with targets their mean cross-entropy in nats, a
        float32 scalar. A cache, `{}` at first, keeps the keys and values of the tokens so far: each
        call then passes only the tokens that follow, context_length of them in all.
        """
        first = cache[self.blocks[0].attention][0].shape[2] if cache else 0
        here = slice(first, first + tokens.shape[1])
        cos, sin = self.cos[here], self.sin[here]
        x = self.embed(tokens)  # (B, T, d_model)
        for block in self.blocks:
            if self.recompute and self.training:
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache)
        logits = self.unembed(self.norm(x))  # (B, T, vocab_size)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def groups(self) -> list[Group]:
        """Every prunable unit of the model as it stands, layer by layer: FFN neurons and KV groups.

        A KV group is a key-value head with all of its query heads: removing it removes their rows
        of q, its rows of k and v, and the columns of o that read them.
        """
        groups = []
        for i, block in enumerate(self.blocks):
            attention, ffn = f"blocks.{i}.attention", f"blocks.{i}.ffn"
            n_kv = block.attention.k.weight.shape[0] // self.config.head_dim
            d_ff = block.ffn.gate.weight.shape[0]
            heads = tuple(
                (f"{attention}.{m}", d) for m, d in (("q", 0), ("k", 0), ("v", 0), ("o", 1))
            )
            neurons = tuple((f"{ffn}.{m}", d) for m, d in (("gate", 0), ("up", 0), ("down", 1)))
            groups.append(Group(i, "n_kv_head", n_kv, heads))
            groups.append(Group(i, "d_ff", d_ff, neurons))
        return groups

    def shape(self) -> GPTConfig:
        """The configuration that builds a model of the present widths."""
        widths = {"d_ff": [], "n_kv_head": []}
        for group in self.groups():
            widths[group.kind].append(group.width)
        return replace(self.config, **widths)
