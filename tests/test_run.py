"""Whole runs of a toy: what train.py trains, logs, saves and resumes."""

import functools
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import TOY, events, run, same_end, train
from test_ranks import assert_close, contents

from data.loader import TokenDataset
from data.prepare import prepare
from model import GPT, KINDS, load_checkpoint
from prune import unit_scores
from schedule import Schedule

SHORT = "--shorter=3"  # 10 steps, with prunes from step 6 to step 9


def at_steps(monkeypatch, actions: dict[int, Callable]) -> None:
    """Call an action in the middle of each of these steps."""
    learning_rate = Schedule.learning_rate

    def act(self, step):
        if step in actions:
            actions[step]()
        return learning_rate(self, step)

    monkeypatch.setattr(Schedule, "learning_rate", act)


# What a run does and logs


def test_a_run_enlarges_prunes_recovers_and_logs_each_step(undisturbed):
    steps = events(undisturbed, "step")
    phases = ["enlarged"] * 12 + ["prune"] * 12 + ["recover"] * 6
    assert [e["phase"] for e in steps] == phases
    assert [e["step"] for e in steps] == list(range(1, 31))
    shape = load_checkpoint(undisturbed)["model_config"]
    flops = 0
    for e in steps:
        widths = {kind: e[kind] for kind in KINDS}
        shape = replace(shape, **widths)
        flops += 8 * 16 * shape.flops_per_token()
        assert e["flops"] == flops
        assert e["params"] == shape.n_params()
        assert e["tokens"] == e["step"] * 8 * 16
        assert e["tokens_per_second"] > 0
        assert e["grad_norm"] > 0
    assert [steps[0][kind] for kind in KINDS] == [32, 4, 16, 4]
    assert [steps[-1][kind] for kind in KINDS] == [8, 1, 8, 2]
    assert shape == load_checkpoint(undisturbed)["model_config"]

    (start,) = events(undisturbed, "start")
    (done,) = events(undisturbed, "done")
    assert start["step"] == start["flops"] == start["tokens"] == 0
    assert start["resumed"] is False
    assert start["changes"] == []
    assert start["torch"] == torch.__version__
    assert start["compute"] == "cpu, float32, eager"
    assert done["flops"] == start["planned_flops"] == flops
    assert done["params"] == shape.n_params()
    assert done["seconds"] >= steps[-1]["seconds"]
    assert [e["step"] for e in events(undisturbed, "save")] == [5, 10, 15, 20, 25, 30]


def test_each_prune_logs_its_widths_and_losses(undisturbed):
    widths = dict(zip(KINDS, (32, 4, 16, 4)))
    before = {"step": 0}
    for e in events(undisturbed, "prune"):
        assert e["width_before"] == widths[e["kind"]] > e["width_after"]
        widths[e["kind"]] = e["width_after"]
        assert len(e["removed"][0]) == e["width_before"] - e["width_after"]
        assert e["tokens"] == (e["step"] - 1) * 8 * 16
        if before["step"] == e["step"]:
            assert e["loss_before"] == before["loss_after"]  # on the same batches
        before = e
    assert list(widths.values()) == [8, 1, 8, 2]


def direct_loss(out: Path, data_dir: Path) -> float:
    """The mean cross-entropy of a run's model on the first tokens of the val split."""
    model = GPT.from_checkpoint(out).eval()
    logits = []
    targets = []
    for x, y in TokenDataset(data_dir, "val", 16).in_order(8, TOY["eval_tokens"]):
        logits.append(model(x).flatten(0, 1))
        targets.append(y.flatten())
    return F.cross_entropy(torch.cat(logits), torch.cat(targets)).item()


def test_the_validation_loss_is_that_of_the_model(toy, undisturbed):
    data_dir = toy.parent / "data"
    (done,) = events(undisturbed, "done")
    nats = direct_loss(undisturbed, data_dir)
    assert done["val_loss"] == pytest.approx(nats, abs=1e-5)
    per_target = TokenDataset(data_dir, "val", 16).bytes_per_target(TOY["eval_tokens"])
    bits = done["val_loss"] / math.log(2) / per_target
    assert done["val_bpb"] == pytest.approx(bits)
    evals = events(undisturbed, "eval")
    assert [e["step"] for e in evals] == [10, 20, 30]
    assert evals[-1]["val_loss"] == done["val_loss"]


def test_the_loop_updates_with_its_optimizers_and_scores_raw_gradients(toy, tmp_path):
    """The first 14 steps by hand, up to the first prune."""
    knobs = ["--grad_clip=0.5", "--weight_decay=0.3", "--learning_rate=2e-2"]
    assert run(toy, tmp_path, "--optimizer=muon", "--stop_after=14", *knobs) == 0
    state = load_checkpoint(tmp_path)
    data = TokenDataset(state["config"]["data_dir"], "train", 16)

    torch.manual_seed(1)
    model = GPT(state["model_config"])
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": [model.embed.weight]}, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.3, fused=True)
    muon = torch.optim.Muon(matrices, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    (ffn,) = [group for group in model.groups() if group.name == "blocks.1.d_ff"]
    scores = 0.0
    clipped = 0
    for step in range(1, 15):
        x, y = data.batch(step, 8, seed=1)
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        new_scores = unit_scores(model, ffn, "sensitivity").detach()
        scores = 0.85 * scores + 0.15 * new_scores
        clipped += torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 0.5
        lr = 2e-2 * step / 3  # a warm-up of 3 steps, then a cosine over the others
        if step >= 3:
            lr = 2e-2 * (0.55 + 0.45 * math.cos(math.pi * (step - 3) / 27))
        for optimizer in (adamw, muon):
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
    assert clipped > 5
    torch.testing.assert_close(state["model"], model.state_dict(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["scores"][ffn.name], scores, rtol=1e-3, atol=0)


def test_naive_restarts_the_moments_at_its_prune(toy, tmp_path):
    knobs = ("--prune_schedule=oneshot", "--lr_restart", "--stop_after=15")
    assert run(toy, tmp_path, *knobs) == 0
    moments = load_checkpoint(tmp_path)["optimizer"].values()
    assert {m["step"].item() for m in moments} == {15 - 12}
    assert {e["step"] for e in events(tmp_path, "prune")} == {13}


# Stop and resume

STOPS = {7: signal.SIGTERM, 11: signal.SIGINT, 18: signal.SIGTERM, 28: signal.SIGINT}


def test_a_signal_saves_and_resume_is_bitwise(toy, undisturbed, tmp_path, monkeypatch):
    """In each phase. Recomputed activations change no bit."""

    def signal_at(*times: float):
        with monkeypatch.context() as clock:
            for now in times:
                clock.setattr(time, "monotonic", lambda now=now: now)
                signal.raise_signal(number)

    # A terminal and torchrun may both send a signal for the same stop
    twice = functools.partial(signal_at, 50.0, 50.4)
    at_once = functools.partial(signal_at, 50.0, 51.0)
    monkeypatch.setattr("os._exit", sys.exit)
    for step, number in STOPS.items():
        for action, last in ((at_once, step // 5 * 5), (twice, step)):
            with monkeypatch.context() as patched:
                at_steps(patched, {step: action})
                knobs = ("--resume", "--recompute=all")
                assert run(toy, tmp_path, *knobs) == 128 + number
            assert load_checkpoint(tmp_path)["step"] == last
    assert run(toy, tmp_path, "--resume", "--recompute=none") == 0
    assert same_end(tmp_path, undisturbed)


VARIANTS = {
    "muon, micro-batches": "--optimizer=muon --micro_batch_size=2",
    "naive": "--prune_schedule=oneshot --lr_restart --warmup_steps=1",
    "random, untied": "--criterion=random --dtype=bfloat16 --tie_embeddings=false",
    "teacher": "--teacher=undisturbed --optimizer=muon",
}


@pytest.mark.parametrize("knobs", VARIANTS.values(), ids=VARIANTS)
def test_a_run_in_parts_ends_in_the_same_bytes(knobs, toy, undisturbed, tmp_path):
    """Stopped before, between and after the prunes. The folder alone continues it."""
    knobs = [k.replace("undisturbed", str(undisturbed)) for k in knobs.split()]
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    assert run(toy, whole, SHORT, *knobs) == 0
    assert run(toy, parts, SHORT, *knobs, "--stop_after=3") == 0
    for step in (7, 9):
        assert train(parts, "--resume", f"--stop_after={step}") == 0
        assert load_checkpoint(parts)["step"] == step
    assert train(parts, "--resume") == 0
    assert same_end(parts, whole)
    assert events(parts, "prune") and len(events(parts, "start")) == 4
    for kind in ("step", "prune", "eval"):
        for a, b in zip(events(parts, kind), events(whole, kind), strict=True):
            a.update(seconds=b["seconds"], tokens_per_second=b.get("tokens_per_second"))
            assert a == {"tokens_per_second": None} | b


def test_float16_skips_overflows_and_resumes(toy, tmp_path, monkeypatch, capsys):
    """Its loss is scaled up so far that some do. If all do, the run has diverged."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**26)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    knobs = ("--dtype=float16", "--optimizer=muon", "--micro_batch_size=4")
    assert run(toy, whole, *knobs) == 0
    skipped = [e["step"] for e in events(whole, "skip")]
    assert skipped[0] == 1 and len(skipped) < 12
    assert f"skip       step {skipped[-1]}: " in capsys.readouterr().out
    steps = [e["step"] for e in events(whole, "step")]
    assert sorted(steps + skipped) == list(range(1, 31))
    state = load_checkpoint(whole)
    assert state["optimizer"]["norm.weight"]["step"] == len(steps)
    assert state["scaler"]["scale"] == 2.0 ** (26 - len(skipped))
    for last in (skipped[-1] - 1, 18):
        assert run(toy, cut, *knobs, "--resume", f"--stop_after={last}") == 0
    assert train(cut, "--resume") == 0
    assert same_end(cut, whole)
    lowest = functools.partial(scaler, init_scale=4.0)
    monkeypatch.setattr(torch.amp, "GradScaler", lowest)
    assert run(toy, tmp_path / "lost", *knobs, "--learning_rate=1e18") == 1
    assert "step 4: overflows at any scale" in capsys.readouterr().err


def test_a_run_goes_on_by_its_folder_alone_wherever_it_is(toy, tmp_path, capsys):
    out = tmp_path / "has moved"
    assert run(toy, tmp_path / "whole", SHORT) == 0
    assert run(toy, tmp_path / "first", SHORT, "--stop_after=7") == 0
    (tmp_path / "first").rename(out)
    data = shutil.copytree(toy.parent / "data", tmp_path / "data")  # it may move, too
    assert train(out, "--resume", "--stop_after=8", f"--data_dir={data}") == 0
    assert load_checkpoint(out)["config"]["data_dir"] == str(data)
    last_line = capsys.readouterr().out.splitlines()[-1]
    command = shlex.split(last_line.partition("python train.py")[2])
    assert command == [str(out), "--resume"]
    for _ in range(2):  # if all is done, nothing is done again
        assert train(*command) == 0
    assert_close(out, tmp_path / "whole", 0)  # one knob has changed: the data's path
    assert not (tmp_path / "first").exists()
    assert len(events(out, "done")) == 1


def test_the_command_line_wins_over_the_checkpoint(toy, tmp_path, capsys):
    """Which wins over the config file and the config.json of the folder."""
    assert run(toy, tmp_path, "--seed=2", "--resume", "--stop_after=10") == 0
    assert events(tmp_path, "start")[0]["resumed"] is False  # no checkpoint yet
    other = tmp_path / "other.py"
    other.write_text("seed = 3\nlearning_rate = 1.0\nd_ff = 64\n")
    (tmp_path / "config.json").write_text('{"max_steps": 9}')
    capsys.readouterr()
    knobs = ("--learning_rate=4e-3", "--resume", "--stop_after=20")
    assert run(other, tmp_path, *knobs) == 0
    change = "learning_rate 0.008 -> 0.004"
    assert f"\nchanged    {change}\n" in capsys.readouterr().out
    assert train(tmp_path, "--resume") == 0
    assert "changed" not in capsys.readouterr().out  # the checkpoint has the new value
    assert [e["changes"] for e in events(tmp_path, "start")] == [[], [change], []]
    config = load_checkpoint(tmp_path)["config"]
    assert (config["seed"], config["learning_rate"]) == (2, 4e-3)
    last_step = events(tmp_path, "step")[-1]
    assert last_step["lr"] == pytest.approx(4e-4)


def test_resume_refuses_another_shape_and_other_data(toy, tmp_path, refused):
    out = tmp_path / "run"
    assert run(toy, out, SHORT, "--stop_after=7") == 0
    data = tmp_path / "data"
    prepare([toy.parent / "text.jsonl"], "shipped", data, val_fraction=0.2)
    before = contents(out)
    for knob in ("d_ff=64", "n_layer=2", "n_head=8", "d_ff_target=4"):
        refused("another shape", out, "--resume", f"--{knob}")
    refused(f"data_dir={data}: not the data", out, "--resume", f"--data_dir={data}")
    refused("warmup_steps=", out, "--resume", "--warmup_steps=11")
    assert contents(out) == before


def test_a_folder_that_holds_a_run_needs_resume_or_overwrite(toy, tmp_path, refused):
    assert run(toy, tmp_path, "--stop_after=6") == 0
    before = contents(tmp_path)
    refused(f"out_dir={tmp_path}: holds a run", tmp_path)
    refused("--overwrite", toy, f"--out_dir={tmp_path}", "--seed=2")
    assert contents(tmp_path) == before
    assert train(tmp_path, "--overwrite", "--stop_after=1") == 0
    assert [e["step"] for e in events(tmp_path, "step")] == [1]
    assert [e["resumed"] for e in events(tmp_path, "start")] == [False]
    (tmp_path / "checkpoint.pt").unlink()
    assert train(tmp_path, "--resume", "--stop_after=2") == 0  # starts afresh
    assert [e["step"] for e in events(tmp_path, "step")] == [1, 2]
    assert [e["resumed"] for e in events(tmp_path, "start")] == [False]


# Other weights: a start and a teacher


def test_a_pruned_checkpoint_is_a_starting_point(toy, undisturbed, tmp_path):
    start = Path(shutil.copy(undisturbed / "checkpoint.pt", tmp_path))
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    knobs = ["--d_ff_target=4", "--n_kv_head_target=0", "--d_model_target=4"]
    knobs += ["--n_layer_target=1", "--learning_rate=1e-5", f"--init_from={start}"]
    assert run(toy, whole, SHORT, *knobs) == 0
    assert run(toy, parts, SHORT, *knobs, "--stop_after=7") == 0
    os.unlink(start)  # it is needed only once
    assert train(parts, "--resume") == 0
    assert same_end(parts, whole)
    first, *_, last = events(whole, "step")
    assert [first[kind] for kind in KINDS] == [8, 1, 8, 2]
    assert [last[kind] for kind in KINDS] == [4, 1, 4, 1]
    loss = events(undisturbed, "step")[-1]["loss"]
    assert first["loss"] == pytest.approx(loss, abs=0.3)


def test_a_run_learns_from_tokens_and_a_teacher(toy, undisturbed, tmp_path):
    weight = 0.3
    knobs = (SHORT, f"--teacher={undisturbed}", f"--teacher_weight={weight}")
    assert run(toy, tmp_path, *knobs, "--micro_batch_size=4") == 0
    data_dir = toy.parent / "data"
    x, y = TokenDataset(data_dir, "train", 16).batch(1, 8, seed=1)
    teacher = GPT.from_checkpoint(undisturbed)
    torch.manual_seed(1)
    shape = replace(teacher.config, d_ff=32, n_kv_head=4, d_model=16, n_layer=4)
    student = GPT(shape)  # before the first step
    logp = student(x).double().log_softmax(-1)
    logq = teacher(x).double().log_softmax(-1)
    from_tokens = -logp.gather(-1, y[..., None]).mean().item()
    from_teacher = -(logq.exp() * logp).sum(-1).mean().item()
    assert abs(from_tokens - from_teacher) > 1e-3
    mixed = (1 - weight) * from_tokens + weight * from_teacher
    assert events(tmp_path, "step")[0]["loss"] == pytest.approx(mixed, abs=1e-5)
    (done,) = events(tmp_path, "done")
    assert done["val_loss"] == pytest.approx(direct_loss(tmp_path, data_dir), abs=1e-5)
    assert done["flops"] == events(tmp_path, "start")[0]["planned_flops"]
    forward = teacher.config.flops_per_token() // 3
    first_step = shape.flops_per_token() + forward
    assert events(tmp_path, "step")[0]["flops"] == 8 * 16 * first_step


@pytest.mark.parametrize("key", ["init_from", "teacher"])
def test_a_start_or_teacher_must_fit(key, toy, undisturbed, tmp_path, refused):
    out = tmp_path / "run"
    knobs = (toy, f"--out_dir={out}")
    padded = ("--round_vocab_to=100", f"--{key}={undisturbed}")
    refused(f"{key}={undisturbed}: has", *knobs, *padded)
    other = tmp_path / "checkpoint.pt"
    state = torch.load(undisturbed / "checkpoint.pt", weights_only=True)
    torch.save(state | {"tokenizer_digest": "of as many tokens"}, other)
    refused(f"{key}={tmp_path}: its tokenizer", *knobs, f"--{key}={tmp_path}")
    assert not out.exists()


# A loss that is not finite


def test_a_loss_of_nan_stops_the_run_and_keeps_the_last_save(toy, tmp_path, capsys):
    assert run(toy, tmp_path, "--learning_rate=1e18", "--save_every=1") == 1
    last = load_checkpoint(tmp_path)["step"]
    error = capsys.readouterr().err
    assert error.startswith(f"error: step {last + 1}: loss ")
    assert error.count("\n") == 1
    assert "lower --learning_rate, with --resume" in error
    one = ["--max_steps=1", "--warmup_steps=0", "--learning_rate=1e18", "--overwrite"]
    one += [f"--{kind}_target=0" for kind in KINDS]
    assert run(toy, tmp_path, *one) == 1  # no step follows the one that broke it
    assert "validation at step 1: loss nan" in capsys.readouterr().err
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()
    assert not (tmp_path / "checkpoint.pt").exists()
