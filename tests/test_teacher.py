"""A teacher: what a run learns from it, what it costs, and which one is refused."""

import shutil
from base64 import b64encode
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import events, refused, run
from test_bench import rows
from test_ranks import assert_close
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from data.loader import TokenDataset
from data.prepare import prepare
from data.tokenizer import SHIPPED_RANKS
from model import GPT
from run.cost import make_plan
from run.read_config import load_config
from run.teacher import Teacher
from tools import export, plan
from tools.load import load_trained


@pytest.fixture(scope="module")
def taught(toy, undisturbed, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("taught") / "run"
    assert run(toy, out, f"--teacher={undisturbed}") == 0
    return out


def lesson(toy, teacher: Path, step: int, *knobs: str) -> tuple:
    """The config of a run with this teacher, the teacher, and the batch of a step."""
    c = load_config(str(toy), [f"--teacher={teacher}", *knobs])
    data = TokenDataset(c.data_dir, "train", c.context_length)
    return c, Teacher(c, data, torch.device("cpu")), *data.batch(step, c.batch_size, c.seed)


@pytest.mark.parametrize("weight", [0, 0.3, 1])
def test_the_loss_is_that_of_the_token_and_that_of_the_teacher(toy, undisturbed, weight):
    c, teacher, x, y = lesson(toy, undisturbed, 1, f"--teacher_weight={weight}")
    model = GPT(make_plan(c, teacher.model.config.vocab_size).enlarged)
    mixed = model(x, teacher.targets(x, y))
    logp, logq = (m(x).double().log_softmax(-1) for m in (model, teacher.model))
    token = -logp.gather(-1, y[..., None]).mean()
    distribution = -(logq.exp() * logp).sum(-1).mean()
    assert mixed.item() == pytest.approx(((1 - weight) * token + weight * distribution).item())
    assert mixed.requires_grad and not teacher.targets(x, y).requires_grad


def test_a_taught_run_resumes_to_the_same_bytes_and_by_its_teacher_alone(
    toy, taught, undisturbed, tmp_path, capsys
):
    """Micro-batches and recomputation change it by rounding. Wherever the teacher is by now."""
    moved, out = shutil.copytree(undisturbed, tmp_path / "moved"), tmp_path / "run"
    assert run(toy, out, f"--teacher={undisturbed}", "--stop_after=18") == 0
    for other, knob in ((taught, f"--teacher={taught}"), ("", "--teacher=")):
        words = f"teacher={other} is not the teacher that the run began with"
        refused(capsys, train.main, toy, f"--out_dir={out}", "--resume", knob, words=words)
    assert run(toy, out, f"--teacher={moved}", "--resume") == 0
    weights = [torch.load(run / "checkpoint.pt")["model"] for run in (out, taught, undisturbed)]
    assert all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())
    assert not torch.allclose(weights[0]["norm.weight"], weights[2]["norm.weight"])
    knobs = ["--micro_batch_size=2", "--recompute", f"--teacher={undisturbed / 'checkpoint.pt'}"]
    assert run(toy, tmp_path / "other", *knobs) == 0
    assert_close(tmp_path / "other", taught, 1e-4)


def test_the_logged_training_loss_is_the_mixed_one_and_validation_is_plain(
    toy, taught, undisturbed, tmp_path
):
    teach, out = f"--teacher={undisturbed}", tmp_path / "run"
    c, teacher, x, y = lesson(toy, undisturbed, 10)
    assert run(toy, out, teach, "--stop_after=9") == 0
    model = load_trained(out).model.cpu()
    mixed = model(x, teacher.targets(x, y)).item()
    assert run(toy, out, teach, "--dtype=bfloat16", "--stop_after=10", "--overwrite") == 0
    for folder, tolerance in ((taught, 1e-5), (out, 0.05)):
        assert events(folder, "step")[9]["loss"] == pytest.approx(mixed, abs=tolerance)
    assert model(x, y).item() < mixed - 0.5
    model, plain, tokens = load_trained(taught).model.cpu(), 0.0, 0
    val = TokenDataset(c.data_dir, "val", c.context_length)
    for x, y in val.in_order(c.batch_size, c.eval_tokens):
        plain += F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
        tokens += y.numel()
    assert events(taught, "done")[0]["val_loss"] == pytest.approx(plain / tokens, abs=1e-5)


def test_a_hugging_face_folder_teaches_alike(toy, undisturbed, taught, tmp_path):
    pytest.importorskip("transformers")
    assert export.main([str(undisturbed), f"--to={tmp_path / 'hf'}"]) == 0
    assert run(toy, tmp_path / "run", f"--teacher={tmp_path / 'hf'}") == 0
    assert_close(tmp_path / "run", taught, 0)


def test_a_teacher_of_another_vocabulary_or_tokenizer_is_refused(
    toy, undisturbed, tmp_path, capsys
):
    """Another tokenizer may have as many tokens."""
    out, ranks = f"--out_dir={tmp_path / 'out'}", tmp_path / "ranks"
    teach = f"--teacher={undisturbed}"
    words = "teacher=.*: its vocabulary has 1024 entries, that of the run 1100"
    refused(capsys, train.main, toy, out, teach, "--round_vocab_to=100", words=words)
    *lines, last = SHIPPED_RANKS.read_text().splitlines()
    unlikely = f"{b64encode(b'of the unlikely').decode()} {last.split()[1]}"
    ranks.write_text("\n".join([*lines, unlikely]))
    prepare([toy.with_name("text.jsonl")], str(ranks), tmp_path / "data")
    words = "the run would write over it"
    refused(capsys, train.main, toy, f"--out_dir={undisturbed}", "--overwrite", teach, words=words)
    gone = f"teacher='{tmp_path}/gone': .*no such checkpoint; if it has moved, name its new place"
    refused(capsys, train.main, toy, out, f"--teacher={tmp_path / 'gone'}", words=gone)
    words = "teacher=.*: its tokenizer is not that of data_dir="
    refused(capsys, train.main, toy, out, teach, f"--data_dir={tmp_path / 'data'}", words=words)


def test_the_plan_counts_what_the_teacher_does(toy, undisturbed, taught, capsys):
    c, teacher, x, y = lesson(toy, undisturbed, 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        teacher.targets(x, y)
    with_teacher, alone = (events(out, "done")[0]["flops"] for out in (taught, undisturbed))
    assert with_teacher - alone == c.max_steps * counter.get_total_flops()
    assert not plan.main([str(toy), f"--teacher={undisturbed}", "--gpus=1"])
    table = rows(capsys.readouterr().out)
    planned = dict(zip(table["phase"], table["the run"]))["teacher FLOPs"]
    assert float(planned) == pytest.approx(with_teacher - alone, rel=0.01)
