"""A teacher: what a run learns from it, what it costs, and which one is refused."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import events, run
from test_ranks import assert_close
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data.loader import TokenDataset
from data.prepare import prepare
from data.tokenizer import SHIPPED_RANKS
from model import GPT
from run.config import load_config
from run.cost import Plan
from run.machine import Machine
from run.teacher import Teacher
from tools import load_trained

SHORT = "--shorter=3"


@pytest.fixture(scope="module")
def taught(toy, undisturbed, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("taught") / "run"
    assert run(toy, out, f"--teacher={undisturbed}", SHORT) == 0
    return out


def lesson(toy, teacher: Path) -> tuple:
    """The config of a run with this teacher, the teacher, and the batch of the first step."""
    c = load_config(str(toy), [f"--teacher={teacher}", SHORT])
    data = TokenDataset(c.data_dir, "train", c.context_length)
    return c, Teacher(c, data, Machine(c)), *data.batch(1, c.batch_size, c.seed)


def test_a_run_learns_from_tokens_and_teacher_and_is_judged_on_tokens(toy, undisturbed, taught):
    c, teacher, x, y = lesson(toy, undisturbed)
    torch.manual_seed(c.seed)
    model = GPT(Plan(c, teacher.model.config.vocab_size).enlarged)  # before the first step
    logp, logq = (m(x).double().log_softmax(-1) for m in (model, teacher.model))
    token = -logp.gather(-1, y[..., None]).mean().item()
    distribution = -(logq.exp() * logp).sum(-1).mean().item()
    assert 0 < c.teacher_weight < 1 and abs(token - distribution) > 1e-3
    mixed = (1 - c.teacher_weight) * token + c.teacher_weight * distribution
    assert events(taught, "step")[0]["loss"] == pytest.approx(mixed, abs=1e-5)
    assert not teacher.targets(x, y).requires_grad
    model, val = load_trained(taught).model.cpu(), TokenDataset(c.data_dir, "val", c.context_length)
    pairs = [(model(x).flatten(0, 1), y.flatten()) for x, y in val.in_order(8, c.eval_tokens)]
    nats = F.cross_entropy(*map(torch.cat, zip(*pairs))).item()
    assert events(taught, "done")[0]["val_loss"] == pytest.approx(nats, abs=1e-5)


def test_a_taught_run_resumes_by_its_teacher_alone(toy, taught, undisturbed, tmp_path, refused):
    moved, out = shutil.copytree(undisturbed, tmp_path / "moved"), tmp_path / "run"
    assert run(toy, out, f"--teacher={undisturbed}", SHORT, "--stop_after=7") == 0
    for other in (taught, ""):
        knobs = (f"--out_dir={out}", SHORT, "--resume", f"--teacher={other}")
        refused(f"teacher={other} ", toy, *knobs)
    assert run(toy, out, f"--teacher={moved}", SHORT, "--resume") == 0
    assert_close(out, taught, 0)


def test_a_teacher_or_start_must_fit(toy, undisturbed, tmp_path, refused, capsys):
    gone, other, given = tmp_path / "gone", tmp_path / "other", (toy, f"--out_dir={tmp_path / 'o'}")
    ranks = SHIPPED_RANKS.read_bytes().split()
    ranks[0], ranks[2] = ranks[2], ranks[0]  # as many tokens, of the same lengths
    (tmp_path / "ranks").write_bytes(b"\n".join(map(b" ".join, zip(ranks[::2], ranks[1::2]))))
    prepare([toy.parent / "text.jsonl"], str(tmp_path / "ranks"), tmp_path / "data")
    assert run(toy, other, f"--data_dir={tmp_path / 'data'}", SHORT) == 0
    refused("init_from=", *given, f"--init_from={other}", SHORT)
    for teacher, knob in ((undisturbed, "--round_vocab_to=100"), (other, SHORT)):
        refused("teacher=", *given, f"--teacher={teacher}", knob)
    refused(f"{gone}: ", *given, f"--teacher={gone}")
    shutil.rmtree(tmp_path / "data")
    refused("teacher=", *given, f"--teacher={other}")
    torch.save(torch.load(undisturbed / "checkpoint.pt") | {"tokenizer": "of other files"}, gone)
    lesson(toy, gone)  # with the same tokens
    for start, warned in ((undisturbed, 0), (gone, 0), (other, 1)):  # which nobody can know
        out = tmp_path / f"from {start.name}"
        assert run(toy, out, f"--init_from={start}", "--stop_after=1") == 0
        assert capsys.readouterr().err.count(f"warning: init_from='{start}'") == warned


def test_the_plan_counts_what_the_teacher_does(toy, undisturbed, taught):
    c, teacher, x, y = lesson(toy, undisturbed)
    alone = Plan(c, teacher.model.config.vocab_size).flops()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        teacher.targets(x, y)
    assert events(taught, "done")[0]["flops"] == alone + c.max_steps * counter.get_total_flops()
