"""What a GPT computes, and what that costs."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig

# vocabulary, context, layers, d_model, head_dim, queries per KV head, KV heads, d_ff
SHAPES = {
    "tied": GPTConfig(50, 12, 2, 16, 4, 2, 2, 24),
    "wide heads": GPTConfig(50, 12, 3, 16, 8, 3, 2, 40, tie_embeddings=False),
    "narrow stream": GPTConfig(50, 12, 1, 8, 8, 2, 2, 24),
}
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)


def large(model):
    """Large random weights, so that no part hides behind small numbers."""
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.3)
    return model


def rope(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embeddings of one head, (T, head_dim), its pairs as complex numbers."""
    half = x.shape[1] // 2
    frequencies = theta ** (-torch.arange(half) / half)
    angles = torch.outer(torch.arange(len(x)), frequencies)
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.exp(1j * angles)
    return torch.cat([turned.real, turned.imag], 1)


def plain_logits(model: GPT, tokens: list[int]) -> torch.Tensor:
    """The formulas of Llama for one sequence, head by head."""
    c = model.config
    w = dict(model.named_parameters(remove_duplicate=False))
    later = torch.ones(len(tokens), len(tokens)).triu(1).bool()

    def norm(x, name):
        mean_square = (x * x).mean(1, keepdim=True)
        return x / torch.sqrt(mean_square + c.norm_eps) * w[f"{name}.weight"]

    x = w["embed.weight"][tokens]  # (T, D)
    for layer in range(c.n_layer):
        block = f"blocks.{layer}"
        h = norm(x, f"{block}.attention_norm")
        q, k, v = (h @ w[f"{block}.attention.{m}.weight"].T for m in "qkv")
        q, k, v = (m.split(c.head_dim, 1) for m in (q, k, v))
        heads = []
        for head in range(c.n_head):
            kv = head // c.queries_per_kv
            query = rope(q[head], c.rope_theta)
            key = rope(k[kv], c.rope_theta)
            scores = (query @ key.T / math.sqrt(c.head_dim)).masked_fill(
                later, -math.inf
            )
            heads.append(scores.softmax(1) @ v[kv])
        x = x + torch.cat(heads, 1) @ w[f"{block}.attention.o.weight"].T
        h = norm(x, f"{block}.ffn_norm")
        gate = h @ w[f"{block}.ffn.gate.weight"].T
        up = h @ w[f"{block}.ffn.up.weight"].T
        silu = gate * torch.sigmoid(gate)
        x = x + (silu * up) @ w[f"{block}.ffn.down.weight"].T
    return norm(x, "norm") @ w["unembed.weight"].T


@shapes
def test_logits_match_the_plain_formulas_in_bfloat16_but_for_rounding(config):
    model = large(GPT(config))
    tokens = [3, 14, 15, 9, 26, 5, 3, 3]
    batch = torch.tensor([tokens])
    with torch.no_grad():
        expected = plain_logits(model, tokens)
        logits = model(batch)[0]
        with torch.autocast("cpu", torch.bfloat16):
            error = model(batch)[0] - expected
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (error.norm(dim=1) < 0.05 * expected.norm(dim=1)).all()


@shapes
def test_a_shape_knows_its_parameters_and_the_flops_that_torch_counts(config):
    model = GPT(config)
    assert config.n_params() == sum(p.numel() for p in model.parameters())
    tokens = torch.zeros(2, config.context_length, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    assert counter.get_total_flops() == tokens.numel() * config.flops_per_token()
