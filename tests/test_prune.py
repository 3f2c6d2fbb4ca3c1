import copy

import pytest
import torch

from model import GPT, GPTConfig
from prune import (
    check_optimizer,
    choose,
    prune,
    slice_group,
    update_scores,
    watch_inputs,
)

CONFIG = GPTConfig(40, 10, 16, 4, 2, [4, 4], [24, 24])
KINDS = ("d_ff", "n_kv_head")


@pytest.fixture(autouse=True)
def double_precision():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class DoubleGPT(GPT):
    """The same computation in float64 throughout, so that equality means 1e-12."""

    def __init__(self, config):
        super().__init__(config)
        for p in self.parameters():
            torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.3)


@pytest.fixture(autouse=True)
def no_float32_inside(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def make():
    model = DoubleGPT(CONFIG)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=1e-2)


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 40, (2, 3, 10), generator=generator)


def update(model, optimizer, seed):
    x, y = batch(seed)
    model(x, y).backward()
    optimizer.step()
    optimizer.zero_grad()


def mask_units(model, group, keep):
    """Silence units without slicing: zero all of their weights. Returns where weights died."""
    dead = {}
    for name, dim in group.members:
        weight = model.get_submodule(name).weight
        rows = keep.repeat_interleave(weight.shape[dim] // group.width)
        dead[name] = ~rows[:, None].expand_as(weight) if dim == 0 else ~rows.expand_as(weight)
        with torch.no_grad():
            weight[dead[name]] = 0.0
    return dead


def some_of(width):
    keep = torch.zeros(width, dtype=torch.bool)
    keep[torch.randperm(width)[: width // 2]] = True
    return keep


@pytest.mark.parametrize("kind", KINDS)
def test_sliced_model_equals_masked_model(kind):
    model, optimizer = make()
    masked = copy.deepcopy(model)
    for group in [g for g in model.groups() if g.kind == kind]:
        keep = some_of(group.width)
        mask_units(masked, group, keep)
        slice_group(model, optimizer, group, keep)
    x, _ = batch(1)
    torch.testing.assert_close(model(x), masked(x), rtol=0, atol=1e-12)
    assert getattr(model.shape(), kind) == [w // 2 for w in getattr(CONFIG, kind)]
    assert model(x).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_adamw_steps_after_slicing_equal_the_masked_models(kind):
    model, optimizer = make()
    for seed in range(3):
        update(model, optimizer, seed)
    masked, masked_optimizer = make()
    masked.load_state_dict(model.state_dict())
    masked_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    dead = {}
    for group in [g for g in model.groups() if g.kind == kind]:
        keep = some_of(group.width)
        dead |= mask_units(masked, group, keep)
        slice_group(model, optimizer, group, keep)
    for seed in range(3, 6):
        x, y = batch(seed)
        model(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        masked(x, y).backward()
        masked_optimizer.step()
        masked_optimizer.zero_grad()
        with torch.no_grad():
            for name, where in dead.items():  # the moments of the dead would move them again
                masked.get_submodule(name).weight[where] = 0.0
    theirs = dict(masked.named_parameters())
    for name, p in model.named_parameters():
        where = dead.get(name.removesuffix(".weight"))
        other = theirs[name] if where is None else theirs[name][~where].view_as(p)
        torch.testing.assert_close(p, other, rtol=0, atol=1e-12)


def test_moments_are_sliced_with_the_weights_and_the_step_count_is_kept():
    model, optimizer = make()
    update(model, optimizer, 0)
    group = next(g for g in model.groups() if g.kind == "d_ff")
    before = optimizer.state[model.blocks[0].ffn.down.weight]
    keep = some_of(group.width)
    slice_group(model, optimizer, group, keep)
    after = optimizer.state[model.blocks[0].ffn.down.weight]
    assert torch.equal(after["exp_avg"], before["exp_avg"][:, keep])
    assert torch.equal(after["exp_avg_sq"], before["exp_avg_sq"][:, keep])
    assert after["step"] == before["step"] == 1


def test_after_every_prune_the_optimizer_holds_exactly_the_models_parameters():
    model, optimizer = make()
    scores = {g.name: torch.rand(g.width) for g in model.groups()}
    for width in (20, 12, 8):
        update(model, optimizer, width)
        prune(model, optimizer, scores, "d_ff", width, "layer", 4, 4)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert [id(p) for p in model.parameters() if p.dim() == 1] == [id(p) for p in held[-5:]]
        assert {id(p) for p in held} == {id(p) for p in model.parameters()}
        assert {len(s) for n, s in scores.items() if n.endswith("d_ff")} == {width}
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(held)
    stranger = torch.nn.Parameter(torch.zeros(2))
    optimizer.param_groups[0]["params"].append(stranger)
    with pytest.raises(AssertionError):
        check_optimizer(model, optimizer, len(list(model.parameters())))


def score(model, criterion, beta=0.0, scores=None, inputs=None, generator=None):
    scores = {} if scores is None else scores
    generator = generator or torch.Generator().manual_seed(1)
    update_scores(scores, model, model.groups(), criterion, beta, inputs or {}, generator)
    return scores


def by_hand(model, kind, value):
    """sqrt of the sum of value(w, grad)^2 over the weights of each unit, with explicit indices."""
    out = {}
    for i, block in enumerate(model.blocks):
        a, f, hd, n = block.attention, block.ffn, CONFIG.head_dim, CONFIG.queries_per_kv
        for j in range(CONFIG.d_ff[i] if kind == "d_ff" else CONFIG.n_kv_head[i]):
            if kind == "d_ff":
                pieces = [(f.gate, (j,)), (f.up, (j,)), (f.down, (slice(None), j))]
            else:
                q, kv = slice(j * n * hd, (j + 1) * n * hd), slice(j * hd, (j + 1) * hd)
                pieces = [(a.q, (q,)), (a.k, (kv,)), (a.v, (kv,)), (a.o, (slice(None), q))]
            total = 0.0
            for m, index in pieces:
                grad = None if m.weight.grad is None else m.weight.grad[index].flatten()
                total += (value(m.weight[index].flatten(), grad) ** 2).sum().item()
            out.setdefault(f"blocks.{i}.{kind}", []).append(total**0.5)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_sensitivity_and_magnitude_equal_a_hand_written_sum_per_unit(kind):
    model, _ = make()
    model(*batch(0)).backward()
    for criterion, value in (("sensitivity", lambda w, g: w * g), ("magnitude", lambda w, g: w)):
        scores = score(model, criterion)
        for name, expected in by_hand(model, kind, value).items():
            torch.testing.assert_close(scores[name], torch.tensor(expected))


def test_activation_is_rms_of_the_unit_times_norm_of_its_column():
    model, _ = make()
    model.train()
    sums, hooks = watch_inputs(model, model.groups())
    seen = []
    model.blocks[1].ffn.down.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    for seed in (0, 1):
        model(batch(seed)[0])
    model.eval()
    model(batch(2)[0])  # validation does not count
    inputs = {name: total / 60 for name, total in sums.items()}
    scores = score(model, "activation", inputs=inputs)
    rms = torch.cat(seen[:2]).square().mean((0, 1)).sqrt()
    column = model.blocks[1].ffn.down.weight.norm(dim=0)
    torch.testing.assert_close(scores["blocks.1.d_ff"], rms * column)
    for hook in hooks:
        hook.remove()
    model.train()
    before = {name: total.clone() for name, total in sums.items()}
    model(batch(3)[0])
    assert all(torch.equal(sums[name], before[name]) for name in sums)


def test_random_is_a_pure_function_of_its_generator():
    model, _ = make()
    draw = [score(model, "random", generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert all(torch.equal(draw[0][name], draw[1][name]) for name in draw[0])
    assert not torch.equal(draw[0]["blocks.0.d_ff"], draw[2]["blocks.0.d_ff"])


def test_scores_are_an_exponential_moving_average():
    model, _ = make()
    scores, expected = {}, 0.0
    for seed in range(3):
        model.zero_grad()
        model(*batch(seed)).backward()
        score(model, "sensitivity", beta=0.85, scores=scores)
        expected = 0.85 * expected + 0.15 * score(model, "sensitivity")["blocks.0.d_ff"]
    torch.testing.assert_close(scores["blocks.0.d_ff"], expected)


def test_choose_keeps_the_best_and_ties_go_to_the_lower_index():
    (mask,) = choose([torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])], 3, "layer")
    assert mask.tolist() == [False, True, True, True, False, False]


def test_global_scope_ranks_across_layers_on_the_grid_above_the_floor():
    scores = [torch.arange(16.0) + 100, torch.arange(16.0), torch.arange(16.0) + 10]
    masks = choose(scores, 8, "global", round_to=4, floor=4)
    assert [int(m.sum()) for m in masks] == [16, 4, 4]
    assert masks[1].nonzero().squeeze(1).tolist() == [12, 13, 14, 15]
    masks = choose(scores[:2], 12, "global", round_to=4, floor=4)
    assert [int(m.sum()) for m in masks] == [16, 8]  # a layer is full: the rest goes to the other
    off_grid = [torch.ones(10), torch.ones(10) * 2]  # 10 is no multiple of 4
    assert [int(m.sum()) for m in choose(off_grid, 4, "global", 4, 0)] == [0, 8]


def test_global_scope_leaves_uneven_widths_that_run_and_rebuild():
    model, optimizer = make()
    update(model, optimizer, 0)
    scores = {g.name: torch.rand(g.width) + g.layer for g in model.groups()}
    prune(model, optimizer, scores, "d_ff", 12, "global", 4, 4)
    prune(model, optimizer, scores, "n_kv_head", 2, "global", 1, 1)
    shape = model.shape()
    assert sum(shape.d_ff) == 24 and len(set(shape.d_ff)) == 2
    assert sum(shape.n_kv_head) == 4 and shape.n_kv_head[0] < shape.n_kv_head[1]
    rebuilt = DoubleGPT(shape)
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(rebuilt(batch(1)[0]), model(batch(1)[0]))
    update(model, optimizer, 1)


def test_a_prune_says_which_units_went_and_by_which_scores():
    model, optimizer = make()
    update(model, optimizer, 0)
    width = {g.name: g.width for g in model.groups()}["blocks.0.d_ff"]
    scores = {g.name: torch.arange(float(g.width)).flip(0) for g in model.groups()}
    cuts = prune(model, optimizer, scores, "d_ff", 4, "layer", 4, 4)
    assert cuts["removed"] == [list(range(4, width))] * 2
    quartiles = [i / 4 * (width - 1) for i in range(5)]  # of all units, the removed ones too
    assert cuts["scores"] == [pytest.approx(quartiles)] * 2
