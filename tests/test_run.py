"""Whole runs of a toy: what a person gets from `python train.py CONFIG`, and by a teacher."""

import functools
import math
import os
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import TOY, events, run, same_end
from test_ranks import assert_close
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from data.loader import TokenDataset
from data.prepare import prepare
from data.tokenizer import SHIPPED_RANKS
from model import GPT, KINDS
from prune import unit_scores
from run.checkpoint import load_checkpoint
from run.config import load_config
from run.cost import Plan
from run.log import Log
from run.machine import Machine
from run.teacher import Teacher
from tools import load_trained


def test_a_run_enlarges_prunes_recovers_and_logs_what_each_cost_and_gave(toy, undisturbed):
    steps, prunes = events(undisturbed, "step"), events(undisturbed, "prune")
    assert [e["phase"] for e in steps] == ["enlarged"] * 12 + ["prune"] * 12 + ["recover"] * 6
    shape = load_checkpoint(undisturbed / "checkpoint.pt")["model_config"]
    for kind, first, last in zip(KINDS, (32, 4, 16, 4), (8, 1, 8, 2)):
        assert (steps[0][kind], steps[-1][kind], getattr(shape, kind)) == (first, last, last)
    assert all(e["width_before"] > e["width_after"] for e in prunes)
    left = {e["step"]: e["params"] for e in prunes}  # of two in a step, after the second
    assert left == {step: steps[step - 1]["params"] for step in left}
    both = [(a, b) for a, b in zip(prunes, prunes[1:]) if a["step"] == b["step"]]
    assert both and all(a["loss_after"] == b["loss_before"] for a, b in both)  # the same batches
    (start,), (done,) = events(undisturbed, "start"), events(undisturbed, "done")
    assert start["torch"] == torch.__version__ and start["hardware"]
    assert (done["tokens"], done["flops"]) == (30 * 8 * 16, start["planned_flops"])
    assert done["params"] == steps[-1]["params"] and done["val_loss"] < prunes[-1]["loss_after"]
    val = TokenDataset(toy.parent / "data", "val", 16)
    bits = done["val_loss"] / math.log(2) / val.bytes_per_target(TOY["eval_tokens"])
    assert done["val_bpb"] == pytest.approx(bits)


def test_a_stop_saves_and_resume_is_bitwise(toy, undisturbed, tmp_path, monkeypatch):
    """By signals, in each phase; one more ends it at once. Recomputed activations change no bit."""
    write, term, ctrl_c = Log.write, signal.SIGTERM, signal.SIGINT

    def write_and_signal(self, event, at, **values):
        write(self, event, at, **values)
        if event == "step" and at == step - 1:  # heeded at the end of `step`
            signal.raise_signal(number)
            assert signal.getsignal(number) == signal.SIG_DFL  # one more ends it at once

    with monkeypatch.context() as patched:
        patched.setattr("run.machine.sleep", lambda _: signal.raise_signal(signal.SIGTERM))
        patched.setattr(Log, "write", write_and_signal)
        for step, number in ((7, term), (11, ctrl_c), (18, term), (28, ctrl_c)):
            assert run(toy, tmp_path, "--resume", "--recompute=all") == 128 + number
            assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == step
    assert run(toy, tmp_path, "--resume") == 0
    assert same_end(tmp_path, undisturbed)


def test_the_loop_updates_with_its_optimizers_and_scores_raw_gradients(toy, tmp_path):
    """The first 14 steps, up to the first prune, again by hand. AdamW has what Muon does not."""
    knobs = ["--grad_clip=0.5", "--weight_decay=0.3", "--score_beta=0.85", "--learning_rate=2e-2"]
    assert run(toy, tmp_path, "--optimizer=muon", "--stop_after=14", *knobs) == 0
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    data = TokenDataset(state["config"]["data_dir"], "train", 16)

    torch.manual_seed(1)
    model = GPT(replace(state["model_config"], d_ff=32, n_kv_head=4))
    matrices = [p for name, p in model.blocks.named_parameters() if "norm" not in name]
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    groups = [{"params": [model.embed.weight]}, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.3, fused=True)
    muon = torch.optim.Muon(matrices, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    optimizers = [adamw, muon]
    (ffn,) = [group for group in model.groups() if group.name == "blocks.1.d_ff"]
    scores, clipped = 0.0, 0
    for step in range(1, 15):
        x, y = data.batch(step, 8, seed=1)
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        scores = 0.85 * scores + 0.15 * unit_scores(model, ffn, "sensitivity").detach()
        clipped += torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 0.5
        cosine = 0.55 + 0.45 * math.cos(math.pi * (step - 3) / 27)  # after a warm-up of 3 steps
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 2e-2 * (step / 3 if step < 3 else cosine)
            optimizer.step()
            optimizer.zero_grad()
    assert clipped > 5
    torch.testing.assert_close(state["model"], model.state_dict(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["scores"][ffn.name], scores, rtol=1e-3, atol=0)


def test_a_run_goes_on_by_its_folder_alone_wherever_it_is(toy, tmp_path, refused, capsys):
    out, knobs = tmp_path / "has moved", ["--optimizer=muon", "--shorter=3"]
    assert run(toy, tmp_path / "whole", *knobs) == 0
    assert run(toy, tmp_path / "first", *knobs, "--stop_after=7") == 0
    (tmp_path / "first").rename(out)
    log, same = (out / "log.jsonl").read_bytes(), (toy, f"--out_dir={out}", *knobs)
    for command in ([out], same):
        refused(f"out_dir={out}: ", *command)
    refused("seed=1 there, 3 here, d_ff_target=8", *same, "--resume", "--seed=3", "--d_ff_target=4")
    assert (out / "log.jsonl").read_bytes() == log
    assert train.main([str(out), "--resume", "--stop_after=8"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    for _ in range(2):  # as it says itself; where all is done, nothing is done again
        assert train.main(shlex.split(said)[-4:-2]) == 0
    assert same_end(out, tmp_path / "whole") and not (tmp_path / "first").exists()
    shutil.copytree(toy.parent / "data", data := tmp_path / "data")  # it may have moved, too
    assert train.main([str(out), "--resume", f"--data_dir={data}"]) == 0
    assert load_checkpoint(out / "checkpoint.pt")["config"]["data_dir"] == str(data)
    assert len(events(out, "done")) == 1
    assert train.main([str(out), "--overwrite", "--stop_after=1"]) == 0
    assert [e["resumed"] for e in events(out, "start")] == [False]


def test_a_run_is_rescued_from_an_older_checkpoint_by_another_rate(toy, tmp_path, refused):
    def kept() -> list[int]:
        return sorted(int(path.stem[11:]) for path in tmp_path.glob("checkpoint-*.pt"))

    assert run(toy, tmp_path, "--keep=3") == 0 and kept() == [20, 25]
    (tmp_path / "checkpoint-20.pt").replace(tmp_path / "checkpoint.pt")
    knobs = (tmp_path, "--resume", "--learning_rate=1e-4", "--seed=2")
    refused("seed=1 there, 2 here, learning_rate=0.008 there, 0.0001 here); give --changed", *knobs)
    refused("d_ff_target=8 there, 4 here); choose", *knobs, "--changed", "--d_ff_target=4")
    assert train.main([*map(str, knobs), "--changed"]) == 0 and kept() == [20, 25]
    changed = {"seed": [1, 2], "learning_rate": [8e-3, 1e-4]}
    assert [e.get("changed") for e in events(tmp_path, "start")] == [None, changed]
    assert [e["lr"] > 1e-4 for e in events(tmp_path, "step")] == [True] * 20 + [False] * 10
    assert train.main([str(tmp_path), "--resume"]) == 0  # the checkpoint has the new values
    assert train.main([str(tmp_path), "--overwrite", "--stop_after=1"]) == 0 and kept() == []


def test_float16_skips_steps_that_overflow_and_resumes_exactly(toy, tmp_path, monkeypatch, capsys):
    """The loss is scaled up so far that some do. Where all do, the run has diverged."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**26)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    knobs = ("--dtype=float16", "--optimizer=muon", "--micro_batch_size=2", "--recompute=all")
    assert run(toy, whole, *knobs) == 0
    skipped = [e["step"] for e in events(whole, "skip")]
    assert skipped[0] == 1 and len(skipped) < 12
    assert f"skip       step {skipped[-1]}: " in capsys.readouterr().out
    steps = [e["step"] for e in events(whole, "step")]
    assert sorted(steps + skipped) == list(range(1, 31))
    state = load_checkpoint(whole / "checkpoint.pt")
    assert state["optimizer"]["norm.weight"]["step"] == len(steps)
    assert state["scaler"]["scale"] == 2.0 ** (26 - len(skipped))
    for last in (skipped[-1] - 1, 18):
        assert run(toy, cut, *knobs, "--resume", f"--stop_after={last}") == 0
    assert run(toy, cut, *knobs, "--resume") == 0
    assert same_end(cut, whole)
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(scaler, init_scale=4.0))
    assert run(toy, tmp_path / "lost", *knobs, "--learning_rate=1e18") == 1
    assert "step 4: gradients overflow at any scale" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "checkpoint.pt"])
def test_no_run_changes_a_file_of_another_program(name, toy, tmp_path, refused):
    theirs = '{"model_type": "llama"}'  # as in a Hugging Face folder
    (tmp_path / name).write_text(theirs)
    refused(tmp_path, tmp_path, "--resume")
    for flag in ("--seed=1", "--resume", "--overwrite"):
        refused(f"out_dir={tmp_path}: holds {name}", toy, f"--out_dir={tmp_path}", flag)
    assert (tmp_path / name).read_text() == theirs


def test_a_loss_of_nan_stops_the_run_and_keeps_the_last_save(toy, tmp_path, capsys):
    assert run(toy, tmp_path, "--learning_rate=1e18", "--save_every=1") == 1
    last = load_checkpoint(tmp_path / "checkpoint.pt")["step"]
    assert f"step {last + 1}: loss " in capsys.readouterr().err
    out = tmp_path / "one step"  # where none comes after the update that broke the weights
    one = ("--max_steps=1", "--warmup_steps=0", *(f"--{kind}_target=0" for kind in KINDS))
    assert run(toy, out, "--learning_rate=1e18", *one) == 1
    assert "NaN" not in (out / "log.jsonl").read_text() and not (out / "checkpoint.pt").exists()


def test_naive_restarts_the_moments_at_its_prune(toy, tmp_path, capsys):
    knobs = ("--prune_schedule=oneshot", "--lr_restart", "--stop_after=15")
    assert run(toy, tmp_path, *knobs) == 0
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert {m["step"].item() for m in state["optimizer"].values()} == {15 - 12}
    assert "n_layer 4 -> 2 in one prune, step 13; " in capsys.readouterr().out


def test_a_pruned_checkpoint_is_a_starting_point(toy, undisturbed, tmp_path, refused):
    knobs = [f"--{kind}_target={n}" for kind, n in zip(KINDS, (4, 0, 4, 1))]
    knobs += ["--learning_rate=1e-5", "--warmup_steps=0", "--shorter=3"]
    begun, out = shutil.copy(undisturbed / "checkpoint.pt", tmp_path), tmp_path / "run"
    again = (f"--init_from={undisturbed / 'checkpoint.pt'}", *knobs, "--resume")
    assert run(toy, out, f"--init_from={begun}", *knobs) == 0
    for other in (again, again[1:]):  # elsewhere, though it is there; none
        refused("init_from=", toy, f"--out_dir={out}", *other)
    refused("init_from=", toy, f"--out_dir={undisturbed}", f"--init_from={begun}", "--resume")
    os.unlink(begun)  # as where it has moved: it is needed once only
    assert run(toy, out, *again) == 0
    first, *_, last = events(out, "step")
    assert [first[kind] for kind in KINDS] == [8, 1, 8, 2]
    assert [last[kind] for kind in KINDS] == [4, 1, 4, 1]
    assert first["loss"] == pytest.approx(events(undisturbed, "step")[-1]["loss"], abs=0.3)


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
