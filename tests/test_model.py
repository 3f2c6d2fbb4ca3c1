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
    """The formulas of Llama, with loops over positions and heads: no batch, no sdpa, no view."""
    c, w = model.config, dict(model.named_parameters(remove_duplicate=False))

    def norm(x, weight):
        return x / torch.sqrt((x * x).mean() + c.norm_eps) * weight

    def rope(x, position):
        half = c.head_dim // 2
        out = torch.empty_like(x)
        for i in range(half):
            angle = position * c.rope_theta ** (-2 * i / c.head_dim)
            cos, sin = math.cos(angle), math.sin(angle)
            out[i] = x[i] * cos - x[half + i] * sin
            out[half + i] = x[half + i] * cos + x[i] * sin
        return out

    xs = [w["embed.weight"][t] for t in tokens]
    for layer in range(c.n_layer):
        p = f"blocks.{layer}."
        hs = [norm(x, w[p + "attention_norm.weight"]) for x in xs]
        heads = []
        for head in range(c.n_head):
            rows = slice(head * c.head_dim, (head + 1) * c.head_dim)
            kv = head // c.queries_per_kv
            kv_rows = slice(kv * c.head_dim, (kv + 1) * c.head_dim)
            q = [rope(w[p + "attention.q.weight"][rows] @ h, t) for t, h in enumerate(hs)]
            k = [rope(w[p + "attention.k.weight"][kv_rows] @ h, t) for t, h in enumerate(hs)]
            v = [w[p + "attention.v.weight"][kv_rows] @ h for h in hs]
            out = []
            for t in range(len(tokens)):
                s = torch.stack([q[t] @ k[u] for u in range(t + 1)]) / math.sqrt(c.head_dim)
                out.append(sum(a * b for a, b in zip(torch.softmax(s, 0), v)))
            heads.append(out)
        for t in range(len(tokens)):
            xs[t] = xs[t] + w[p + "attention.o.weight"] @ torch.cat([h[t] for h in heads])
        for t, x in enumerate(xs):
            h = norm(x, w[p + "ffn_norm.weight"])
            gate, up = w[p + "ffn.gate.weight"] @ h, w[p + "ffn.up.weight"] @ h
            xs[t] = x + w[p + "ffn.down.weight"] @ (gate * torch.sigmoid(gate) * up)
    return torch.stack([w["unembed.weight"] @ norm(x, w["norm.weight"]) for x in xs])


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_logits_match_the_plain_formulas_in_bfloat16_but_for_rounding(config):
    model, tokens = large(GPT(config)), [3, 14, 15, 9, 26, 5, 3, 3]
    with torch.no_grad():
        expected, logits = plain_logits(model, tokens), model(torch.tensor([tokens]))[0]
        with torch.autocast("cpu", torch.bfloat16):
            error = model(torch.tensor([tokens]))[0] - expected
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (error.norm(dim=1) < 0.05 * expected.norm(dim=1)).all()
