import math

import pytest
import torch

from model import GPT, GPTConfig

# vocabulary, context, layers, d_model, head_dim, queries per KV head, KV heads, d_ff
SHAPES = {
    "tied": GPTConfig(50, 12, 2, 16, 4, 2, 2, 24),
    "wide heads": GPTConfig(50, 12, 3, 16, 8, 3, 2, 40, tie_embeddings=False),
    "narrow stream": GPTConfig(50, 12, 1, 8, 8, 2, 2, 24),
}


def large(model):
    """Large random weights, so that no part hides behind small numbers."""
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.3)
    return model


def plain_logits(model: GPT, tokens: list[int]) -> torch.Tensor:
    """The formulas of Llama for one sequence, head by head, its pairs as complex numbers."""
    c, w = model.config, dict(model.named_parameters(remove_duplicate=False))
    half, later = c.head_dim // 2, torch.ones(len(tokens), len(tokens)).triu(1).bool()

    def norm(x, name):
        return x / torch.sqrt((x * x).mean(1, keepdim=True) + c.norm_eps) * w[f"{name}.weight"]

    def rope(x):  # (T, head_dim)
        angles = torch.outer(torch.arange(len(x)), c.rope_theta ** (-torch.arange(half) / half))
        turned = torch.complex(x[:, :half], x[:, half:]) * torch.exp(1j * angles)
        return torch.cat([turned.real, turned.imag], 1)

    x = w["embed.weight"][tokens]  # (T, D)
    for p in (f"blocks.{layer}." for layer in range(c.n_layer)):
        h, heads = norm(x, f"{p}attention_norm"), []
        q, k, v = ((h @ w[f"{p}attention.{m}.weight"].T).split(c.head_dim, 1) for m in "qkv")
        for head in range(c.n_head):
            kv = head // c.queries_per_kv
            scores = rope(q[head]) @ rope(k[kv]).T / math.sqrt(c.head_dim)
            heads.append(scores.masked_fill(later, -math.inf).softmax(1) @ v[kv])
        x = x + torch.cat(heads, 1) @ w[f"{p}attention.o.weight"].T
        gate, up = (norm(x, f"{p}ffn_norm") @ w[f"{p}ffn.{m}.weight"].T for m in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ w[f"{p}ffn.down.weight"].T
    return norm(x, "norm") @ w["unembed.weight"].T


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_logits_match_the_plain_formulas_in_bfloat16_but_for_rounding(config):
    model, tokens = large(GPT(config)), [3, 14, 15, 9, 26, 5, 3, 3]
    with torch.no_grad():
        expected, logits = plain_logits(model, tokens), model(torch.tensor([tokens]))[0]
        with torch.autocast("cpu", torch.bfloat16):
            error = model(torch.tensor([tokens]))[0] - expected
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (error.norm(dim=1) < 0.05 * expected.norm(dim=1)).all()
