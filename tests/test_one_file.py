"""What students open first: docs/one_file.py computes what the four files do; the notebook's tasks
take their solutions, and nothing else."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

import prune
from docs import one_file
from model import SLICES
from schedule import Schedule

SHORT = {"max_steps": 24, "batch_size": 2, "context_length": 8, "warmup_steps": 4, "prune_every": 2}


def knobs(**changes) -> SimpleNamespace:
    return SimpleNamespace(**one_file.KNOBS | changes)


def plan(c: SimpleNamespace) -> Schedule:
    others = {"prune_schedule": "cubic", "lr_restart": False, "min_lr_fraction": 0.0}
    return Schedule(SimpleNamespace(**vars(c), **others))


def trained() -> tuple[one_file.GPT, torch.optim.AdamW]:
    """A model after a step, with the gradients of another."""
    torch.manual_seed(1)
    model = one_file.GPT(knobs(**SHORT))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(*torch.randint(256, (2, 3, 8))).backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    "changes", [{}, SHORT, {"prune_start": 0.5, "prune_end": 0.75, "d_ff": 250}]
)
def test_width_and_learning_rate_are_those_of_the_schedule_at_all_steps(changes):
    c = knobs(**changes)
    s, steps = plan(c), range(1, c.max_steps + 1)
    widths = [one_file.width(step, c) for step in steps]
    assert widths == [s.width(step, "d_ff") for step in steps] and len(set(widths)) > 3
    rates = [one_file.learning_rate(step, c) for step in steps]
    assert rates == pytest.approx([s.learning_rate(step) for step in steps])


@pytest.mark.parametrize("criterion", ["sensitivity", "magnitude"])
def test_scores_are_those_of_prune(criterion):
    model, _ = trained()
    slices = [s._replace(name=s.name.replace("ffn.", "blocks.1.")) for s in SLICES["d_ff"]]
    group = prune.UnitGroup("blocks.1.d_ff", "d_ff", 256, tuple(slices))
    scores = one_file.unit_scores(model.blocks[1], criterion)
    torch.testing.assert_close(scores, prune.unit_scores(model, group, criterion).detach())


def test_a_cut_model_computes_what_a_masked_one_does_and_its_moments_are_cut_alike():
    model, optimizer = trained()
    masked, its_optimizer = copy.deepcopy((model, optimizer))
    batch, keep = torch.randint(256, (2, 3, 8)), torch.arange(1, 256, 3)
    for block, whole in zip(model.blocks, masked.blocks):
        one_file.slice_group(block, optimizer, keep)
        for where in SLICES["d_ff"]:
            name = where.name.removeprefix("ffn.")
            small, large = block.get_parameter(name), whole.get_parameter(name)
            for key in ("exp_avg", "exp_avg_sq"):
                moment = its_optimizer.state[large][key].index_select(where.dim, keep)
                assert torch.equal(optimizer.state[small][key], moment) and moment.any()
            goes = torch.ones(256, dtype=torch.bool).index_fill(0, keep, False).nonzero().squeeze(1)
            large.data.index_fill_(where.dim, goes, 0.0)
    assert model.blocks[0].down.weight.shape == (32, 85) and len(model.blocks[0].scores) == 85
    torch.testing.assert_close(model(*batch), masked(*batch))


@pytest.mark.parametrize("change", ["", "criterion=random", "fresh_optimizer=1"])
def test_a_run_prunes_by_averaged_scores_when_it_is_planned(change, monkeypatch, capsys):
    c, average, seen = knobs(**SHORT), {}, []

    def unit_scores(block, criterion, real=one_file.unit_scores):
        s = real(block, criterion)
        average[block] = average.get(block, torch.zeros(256)) * 0.85 + s * 0.15
        return s

    def slice_group(block, optimizer, keep, real=one_file.slice_group):
        torch.testing.assert_close(block.scores, average[block])
        assert torch.equal(keep, prune.choose(average[block], len(keep)).nonzero().squeeze(1))
        real(block, optimizer, keep)
        average[block] = average[block][keep]
        seen.append((len(keep), optimizer.state[block.up.weight]))

    monkeypatch.setattr(one_file, "unit_scores", unit_scores)
    monkeypatch.setattr(one_file, "slice_group", slice_group)
    monkeypatch.chdir(ROOT)
    one_file.main([*(f"{key}={value}" for key, value in SHORT.items()), *change.split()])
    steps = plan(c).prune_steps()
    planned = [one_file.width(step, c) for step in steps for _ in range(c.n_layer)]
    assert [kept for kept, _ in seen] == planned
    done = c.max_steps if change != "fresh_optimizer=1" else steps[-1] - steps[-2]
    assert seen[-1][1].get("step", 0) == done
    *prunes, last = capsys.readouterr().out.splitlines()
    assert [int(re.match(r"step (\d+):", line)[1]) for line in prunes] == steps
    assert last.startswith("prunes cost")


def test_a_knob_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        one_file.main(["criterio=random"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "criterio:" in error


MISTAKES = {  # task -> changes of its solution, and words of what its check says then
    "cut": [("up[stays]", "gate[stays]", "own matrix"), ("gate[stays]", "gate", "row or a column")],
    "score": [(".sqrt()", "", "root"), ("gate.square().sum(1) + ", "", "matrix missing")],
    "choice": [("descending=True", "", "stays"), ("[:n_keep]", "[:3]", "3 neurons stay")],
    "width": [("// 100 * 100 ", "", "hold until"), ("round_up", "int", "multiple of 16")],
}


def test_the_tasks_of_the_notebook_take_their_solutions_and_nothing_else():
    pytest.importorskip("matplotlib").use("Agg")
    cells = json.loads((ROOT / "docs/by_hand.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = {cell["id"]: "".join(cell["source"]) for cell in cells}
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code" and "train.main" not in sources[cell["id"]]:
            exec(sources[cell["id"]].replace("os.chdir", ""), names)
        if task := re.match(r"turn-(\w+)-code", cell["id"]):
            check = re.findall(r"^print\((check_.*\))\)$", sources[cell["id"]], re.M)[-1]
            assert eval(check, names) == "not solved yet"
            solution = re.search(r"```python\n(.*?)```", sources[f"turn-{task[1]}-solved"], re.S)[1]
            exec(solution, names)
            assert eval(check, names).startswith("right")
            for old, new, word in MISTAKES.pop(task[1]):
                assert old in solution
                exec(solution.replace(old, new), names)
                with pytest.raises(AssertionError, match=word):
                    eval(check, names)
        if not MISTAKES:
            break
