import math
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig

SHAPES = {
    "grouped": GPTConfig(50, 12, 16, 4, 2, [2, 2], [24, 24]),
    "uneven": GPTConfig(50, 12, 16, 8, 3, [1, 2], [8, 40], tie_embeddings=False),
}


def make(config: GPTConfig, dtype=torch.float32) -> GPT:
    torch.manual_seed(0)
    model = GPT(config)
    for p in model.parameters():  # large weights, so that no part hides behind small numbers
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.3)
    return model.to(dtype)


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
        for head in range(c.n_kv_head[layer] * c.queries_per_kv):
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
def test_logits_match_the_plain_formulas(config):
    model = make(config)
    tokens = [3, 14, 15, 9, 26, 5, 3, 3]
    with torch.no_grad():
        logits, expected = model(torch.tensor([tokens]))[0], plain_logits(model, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("calls", [[5, 1, 1, 1, 4], [1] * 12, [3, 9], [12]], ids=str)
def test_with_a_cache_logits_are_those_of_the_whole_sequence(config, calls):
    model, cache = make(config), {}
    tokens = torch.randint(0, 50, (2, 12))
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split(calls, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-5, atol=1e-5)
        assert model(tokens[:, :1], cache={}).shape == (2, 1, 50)  # another cache starts afresh


def test_loss_is_the_mean_cross_entropy_in_nats():
    model = make(SHAPES["grouped"])
    x, y = torch.randint(0, 50, (2, 3, 12))
    p = torch.softmax(model(x).double(), -1)
    by_hand = -sum(p[b, t, y[b, t]].log() for b in range(3) for t in range(12)) / 36
    assert model(x, y).item() == pytest.approx(by_hand.item(), abs=1e-5)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_no_token_sees_the_future(config):
    model = make(config)
    x = torch.randint(0, 50, (1, 12))
    changed = x.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 50
    a, b = model(x), model(changed)
    assert torch.equal(a[0, :7], b[0, :7])
    assert not torch.equal(a[0, 7], b[0, 7])


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_flops_are_what_torch_counts(config):
    model = GPT(config)
    x = torch.randint(0, 50, (3, 12))
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(x, x).backward()
    assert counter.get_total_flops() == config.flops_per_token() * x.numel()


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_parameters_are_counted_from_the_shape(config):
    assert config.n_parameters() == sum(p.numel() for p in GPT(config).parameters())


def test_shape_is_read_from_the_weights():
    config = SHAPES["uneven"]
    assert GPT(config).shape() == config
    assert GPT(replace(config, d_ff=[3, 5])).shape().d_ff == [3, 5]
