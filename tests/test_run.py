"""Whole runs of a toy: what a person gets from `python train.py CONFIG`."""

import contextlib
import json
import math
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train as train_module
from data.loader import TokenDataset
from data.prepare import prepare
from model import GPT, GPTConfig
from run.checkpoint import FORMAT, CheckpointError, Log, load_checkpoint, load_model, write_text
from run.report import step_line
from tools import sample

ROOT = Path(__file__).parent.parent
# Widths fall in 6 prunes of d_ff and 3 of n_kv_head between steps 13 and 25.
TOY = {
    "max_steps": 30, "batch_size": 8, "context_length": 16, "warmup_steps": 3,
    "n_layer": 2, "d_model": 16, "n_head": 4, "n_kv_head": 4, "d_ff": 32,
    "d_ff_target": 8, "n_kv_head_target": 1, "round_to": 4,
    "prune_start": 0.4, "prune_end": 0.8, "prune_every": 2,
    "log_every": 1, "eval_every": 10, "save_every": 5, "eval_tokens": 500,
    "device": "cpu", "dtype": "float32", "compile": "off",
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A config file with its data: sentences that a small model can learn."""
    folder = tmp_path_factory.mktemp("toy")
    texts = [f"The sum of {a} and {b} is {a + b}. " * 3 for a in range(20) for b in range(20)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(lines)
    prepare([folder / "text.jsonl"], "shipped", folder / "data")
    knobs = TOY | {"data_dir": str(folder / "data")}
    config = folder / "toy.py"
    config.write_text("".join(f"{key} = {value!r}\n" for key, value in knobs.items()))
    return config


def run(config: Path, out: Path, *arguments: str) -> int:
    return train_module.main([str(config), f"--out_dir={out}", *arguments])


def events(out: Path, name: str) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def same_end(a: Path, b: Path) -> bool:
    return (a / "checkpoint.pt").read_bytes() == (b / "checkpoint.pt").read_bytes()


def wait_until(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
    """Until something has happened, which the process does while it runs, or it has ended. No clock
    bounds this but the deadline of every test (conftest.py).
    """
    ended = False
    while not happened():
        assert not ended, f"it has ended before, with exit code {process.returncode}"
        ended = process.poll() is not None
        time.sleep(0.001)


@pytest.fixture(scope="module")
def undisturbed(toy, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(toy, out) == 0
    return out


def test_run_enlarges_prunes_recovers_and_ends_at_the_target(undisturbed):
    steps = events(undisturbed, "step")
    assert [e["step"] for e in steps] == list(range(1, 31))
    assert [e["phase"] for e in steps] == ["enlarged"] * 12 + ["prune"] * 12 + ["recover"] * 6
    assert (steps[0]["d_ff"], steps[0]["n_kv_head"]) == (32, 4)
    assert (steps[-1]["d_ff"], steps[-1]["n_kv_head"]) == (8, 1)
    for key in ("d_ff", "n_kv_head", "params"):
        assert all(a[key] >= b[key] for a, b in zip(steps, steps[1:]))
    rates = [e["lr"] for e in steps]
    assert all(a > b for a, b in zip(rates[2:], rates[3:]))
    shape = load_checkpoint(undisturbed / "checkpoint.pt")["model_config"]
    assert (shape.d_ff, shape.n_kv_head) == ([8, 8], [1, 1])
    assert events(undisturbed, "eval")[-1]["val_loss"] < events(undisturbed, "eval")[0]["val_loss"]


def test_log_carries_what_other_tools_rely_on(undisturbed):
    common = {"event", "step", "tokens", "flops", "seconds"}
    widths = {"params", "d_ff", "n_kv_head", "phase", "skipped"}
    rates = {"loss", "lr", "grad_norm", "tokens_per_second"}
    assert set(events(undisturbed, "step")[0]) == common | widths | rates
    for e in events(undisturbed, "prune"):
        keys = {"group", "width_before", "width_after", "loss_before", "loss_after"}
        assert set(e) == common | keys | {"removed", "scores"}
        assert e["width_before"] > e["width_after"] and e["loss_before"] != e["loss_after"]
    (done,) = events(undisturbed, "done")
    assert {"val_loss", "val_bpb", "params"} | common == set(done)
    assert done["flops"] == events(undisturbed, "start")[0]["planned_flops"]
    assert done["tokens"] == 30 * 8 * 16
    saved = [e["step"] for e in events(undisturbed, "save")]
    assert saved == [5, 10, 15, 20, 25, 30]
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["d_ff_target"] == 8 and config["out_dir"] == str(undisturbed)


def test_bits_per_byte_are_nats_per_token_over_the_bytes_of_the_split(toy, undisturbed):
    (done,) = events(undisturbed, "done")
    val = json.loads((toy.parent / "data" / "meta.json").read_text())["val"]
    nats_per_byte = done["val_loss"] * val["tokens"] / val["bytes"]
    assert done["val_bpb"] == pytest.approx(nats_per_byte / math.log(2))


def test_loss_around_a_prune_is_on_the_same_batches(undisturbed):
    prunes = events(undisturbed, "prune")
    both = [(a, b) for a, b in zip(prunes, prunes[1:]) if a["step"] == b["step"]]
    assert both and all(a["loss_after"] == b["loss_before"] for a, b in both)


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(toy, undisturbed, tmp_path):
    assert run(toy, tmp_path / "a") == 0 and same_end(tmp_path / "a", undisturbed)
    assert run(toy, tmp_path / "b", "--seed=2") == 0 and not same_end(tmp_path / "b", undisturbed)


def stop_at(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send ourselves a real signal during `step`."""
    write = Log.write

    def write_and_signal(self, event, **values):
        write(self, event, **values)
        if event == "step" and values["step"] == step - 1:  # it is heeded at the end of `step`
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Log, "write", write_and_signal)


@pytest.mark.parametrize(
    "step, number",
    [(7, signal.SIGTERM), (11, signal.SIGINT), (18, signal.SIGTERM), (28, signal.SIGINT)],
    ids=["enlarged", "scoring", "prune", "recover"],
)
def test_a_stop_saves_and_resume_is_bitwise(step, number, toy, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_at(patched, step, number)
        assert run(toy, out) == 128 + number
    assert load_checkpoint(out / "checkpoint.pt")["step"] == step
    assert run(toy, out, "--resume") == 0
    assert same_end(out, undisturbed)
    assert [e["step"] for e in events(out, "step")] == list(range(1, 31))


@pytest.mark.parametrize("other", ["criterion=activation", "criterion=random", "dtype=float16"])
def test_resume_is_bitwise_for_other_criteria_precisions_and_uneven_layers(
    other, toy, tmp_path, monkeypatch
):
    knobs = [f"--{other}", "--scope=global", "--layer_floor=0.5"]
    assert run(toy, tmp_path / "whole", *knobs) == 0
    with monkeypatch.context() as patched:
        stop_at(patched, 18)
        assert run(toy, tmp_path / "cut", *knobs) == 128 + signal.SIGTERM
    assert run(toy, tmp_path / "cut", "--resume", *knobs) == 0
    assert same_end(tmp_path / "cut", tmp_path / "whole")
    shape = load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["model_config"]
    assert sum(shape.d_ff) == 16 and min(shape.d_ff) >= 4 and sum(shape.n_kv_head) == 2


@pytest.mark.parametrize("criterion", ["sensitivity", "activation", "magnitude"])
def test_the_loop_is_plain_adamw_and_scores_the_gradient_before_clipping(
    criterion, toy, tmp_path, monkeypatch
):
    """The first 14 steps, up to the first prune, again by hand with torch's own parts."""
    knobs = ["--grad_clip=0.5", "--weight_decay=0.3", "--score_beta=0.85", "--learning_rate=2e-2"]
    out = tmp_path / "run"
    stop_at(monkeypatch, 14)
    run(toy, out, f"--criterion={criterion}", *knobs)
    state = load_checkpoint(out / "checkpoint.pt")
    data = TokenDataset(state["config"]["data_dir"], "train", 16)

    torch.manual_seed(1)
    model = GPT(replace(state["model_config"], d_ff=[32] * 2, n_kv_head=[4] * 2))
    decayed = [p for name, p in model.named_parameters() if "norm" not in name]
    kept = [p for name, p in model.named_parameters() if "norm" in name]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    scores, clipped, read = 0.0, 0, []
    ffn = model.blocks[1].ffn
    ffn.down.register_forward_pre_hook(lambda module, args: read.append(args[0].detach()))
    for step in range(1, 15):
        x, y = data.batch(step, 8, seed=1)
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        weights = [m.weight.detach().clone() for m in (ffn.gate, ffn.up, ffn.down)]
        if criterion == "activation":
            s = read[-1].square().mean((0, 1)).sqrt() * weights[2].norm(dim=0)
        else:
            if criterion == "sensitivity":
                for w, m in zip(weights, (ffn.gate, ffn.up, ffn.down)):
                    w *= m.weight.grad
            s = sum(w.square().sum(dim) for w, dim in zip(weights, (1, 1, 0))).sqrt()
        scores = 0.85 * scores + 0.15 * s
        clipped += torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 0.5
        for group in optimizer.param_groups:  # warm-up over 3 steps, then a cosine to step 30
            cosine = 0.55 + 0.45 * math.cos(math.pi * (step - 3) / 27)
            group["lr"] = 2e-2 * (step / 3 if step < 3 else cosine)
        optimizer.step()
        optimizer.zero_grad()
    assert clipped > 5
    for name, p in model.named_parameters():
        torch.testing.assert_close(state["model"][name], p.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["scores"]["blocks.1.d_ff"], scores, rtol=1e-3, atol=0)


def test_validation_weighs_every_token_alike(toy, undisturbed):
    state = load_checkpoint(undisturbed / "checkpoint.pt")
    data = TokenDataset(state["config"]["data_dir"], "val", 16)
    model = load_model(state)
    losses = [
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").detach()
        for x, y in data.in_order(1)
    ]
    ranks = train_module.Ranks(torch.device("cpu"))
    got = train_module.evaluate(model, data, 10**9, 8, contextlib.nullcontext, ranks)
    assert len(losses[-1]) < 16 and sum(map(len, losses)) == data.tokens - 1
    assert got == pytest.approx(torch.cat(losses).double().mean().item(), abs=1e-5)


def test_a_stopped_run_says_how_to_go_on_and_a_finished_one_what_to_do_with_it(
    toy, tmp_path, capsys
):
    out = tmp_path / "my run"
    for steps in (["--stop_after=7"], ["--resume", "--stop_after=15"]):
        assert run(toy, out, *steps) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.endswith(f"; python train.py '{out}' --resume goes on")
    assert train_module.main(shlex.split(last)[-4:-2]) == 0
    end = capsys.readouterr().out.partition("\n\n")[2]
    assert f"python -m tools.sample '{out}'\n" in end and f"tools.plot '{out}'\n" in end
    assert "; bigram baseline " in end and "train.py" not in end and "resume" not in end


def test_on_a_terminal_the_bar_shows_all_in_80_columns(toy, tmp_path):
    pty, fcntl, termios = map(pytest.importorskip, ("pty", "fcntl", "termios"))
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "train.py", str(toy), f"--out_dir={tmp_path}", "--scope=global"]
    shown = b""
    with subprocess.Popen(command, cwd=ROOT, stdin=its, stdout=its, stderr=its):
        os.close(its)
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(ours, 4096):
                shown += part
    os.close(ours)
    lines = [line for line in re.split("[\r\n]+", shown.decode()) if " loss " in line]
    whole = r"\d+/30 loss \S+ \S+ tok/s d_ff [\d-]+ kv [\d-]+ \S+ left \|.+\|"
    bars = [line for line in lines if re.fullmatch(whole, line.strip())]
    assert bars and len(bars) == len([line for line in lines if "tok/s" in line])
    assert bars[-1].startswith("30/30 ") and max(map(len, bars)) < 80
    widest = GPTConfig(1, 1, 1, 1, 1, [8, 16], [10_000, 20_000])
    line = f"1000000/1000000 {step_line(10.1234, 123_456, widest, 999 * 3600)}"
    assert len(line) < 80


def test_resume_starts_afresh_where_there_is_nothing_and_repeats_nothing_when_done(
    toy, undisturbed, tmp_path, capsys
):
    assert run(toy, tmp_path / "run", "--resume") == 0
    assert run(toy, tmp_path / "run", "--resume") == 0
    assert same_end(tmp_path / "run", undisturbed)
    assert len(events(tmp_path / "run", "done")) == 1


def test_a_run_goes_on_by_its_folder_alone_wherever_it_is(toy, tmp_path, capsys, monkeypatch):
    """Also one whose length comes from another config, made shorter, and on another look."""
    idea, wide = tmp_path / "idea.py", tmp_path / "wide.py"
    idea.write_text(toy.read_text() + "n_kv_head_target = 0\n")
    wide.write_text(idea.read_text() + f"d_ff = 8; d_ff_target = 0; match_flops = {str(idea)!r}\n")
    assert run(wide, tmp_path / "whole", "--seed=3", "--shorter=2") == 0
    assert run(wide, tmp_path / "first", "--seed=3", "--shorter=2", "--stop_after=7") == 0
    assert load_checkpoint(tmp_path / "first" / "checkpoint.pt")["step"] == 7
    (tmp_path / "first").rename(tmp_path / "moved")
    idea.unlink()
    moved = str(tmp_path / "moved")
    assert train_module.main([moved]) == 2
    assert f"out_dir={moved}: holds a run; --resume goes on" in capsys.readouterr().err
    assert train_module.main([moved, "--resume", "--log_every=3"]) == 0
    assert not (tmp_path / "first").exists()
    a, b = (load_checkpoint(tmp_path / n / "checkpoint.pt") for n in ("whole", "moved"))
    assert a["step"] == b["step"] > 15 and b["config"].pop("log_every") == 3
    assert a["config"].items() > b["config"].items() and a["config"]["seed"] == 3
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    monkeypatch.chdir(tmp_path)
    assert train_module.main(["moved/", "--overwrite"]) == 0
    assert [e["resumed"] for e in events(tmp_path / "moved", "start")] == [False]


def test_a_folder_that_no_run_made_is_one_line(tmp_path, capsys):
    config = tmp_path / "config.json"
    for content in (None, "", "[1]", '"max_steps"', '{"model_type": "llama"}', "{" * 10_000):
        if content is not None:
            config.write_text(content)
        assert train_module.main([str(tmp_path), "--resume"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path}: not a run's folder") and error.count("\n") == 1
    config.write_text('{"max_steps": 10, "d_ff": "wide"}')
    assert train_module.main([str(tmp_path), "--resume"]) == 2
    assert f"{tmp_path}: d_ff='wide' is not of type int" in capsys.readouterr().err


def test_an_occupied_out_dir_is_refused_unless_overwritten(toy, undisturbed, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "log.jsonl").write_text("mine")
    assert run(toy, out) == 2
    error = capsys.readouterr().err
    assert str(out) in error and "--resume" in error and "--overwrite" in error
    assert (out / "log.jsonl").read_text() == "mine" and len(list(out.iterdir())) == 1
    assert run(toy, out, "--overwrite") == 0 and same_end(out, undisturbed)


def test_resume_with_a_contradicting_config_is_refused(toy, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_at(patched, 6)
        run(toy, out)
    assert run(toy, out, "--resume", "--d_ff_target=16", "--seed=3") == 2
    error = capsys.readouterr().err
    assert "d_ff_target=8 there, 16 here" in error and "seed=1 there, 3 here" in error
    assert load_checkpoint(out / "checkpoint.pt")["step"] == 6


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    toy, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "run"
    forward = train_module.GPT.forward
    calls = iter(range(1000))

    def diverge(self, tokens, targets=None):
        loss = forward(self, tokens, targets)
        return loss * float("nan") if self.training and next(calls) == 8 else loss

    monkeypatch.setattr(train_module.GPT, "forward", diverge)
    assert run(toy, out) == 1
    error = capsys.readouterr().err
    assert "step 9" in error and "nan" in error and "learning rate" in error
    assert str(out / "checkpoint.pt") in error
    assert load_checkpoint(out / "checkpoint.pt")["step"] == 5


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return (Path.touch, (Path(self.victim),))


def test_a_malicious_pickle_is_refused_and_not_executed(toy, undisturbed, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    crafted = {"format": FORMAT, "config": "{}", "model_config": '{"d_ff": 3}'}
    foreign = ({"model": Malicious(tmp_path / "victim")}, {"model": torch.zeros(2)}, [1], crafted)
    for content in foreign:
        torch.save(content, out / "checkpoint.pt")
        assert run(toy, out, "--resume") == 2
        assert str(out / "checkpoint.pt") in capsys.readouterr().err
    assert not (tmp_path / "victim").exists()
    whole = (undisturbed / "checkpoint.pt").read_bytes()
    for damaged in (b"PK" + bytes(1000), b"", whole[:-100], whole[: len(whole) // 2]):
        (out / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="checkpoint.pt"):
            load_checkpoint(out / "checkpoint.pt")


def test_a_write_that_is_cut_short_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    write_text(path, "old")

    def killed(*args):
        raise KeyboardInterrupt

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(os, call, killed)
            write_text(path, "a new and longer content")
        assert path.read_bytes() == b"old"
    write_text(path, "new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_checkpoint_of_any_shape_reloads_strictly_with_clean_names(undisturbed):
    state = load_checkpoint(undisturbed / "checkpoint.pt")
    model = load_model(state)
    names = {name for name, _ in model.named_parameters()}
    assert set(state["optimizer"]) == names
    for name, p in model.named_parameters():
        moments = state["optimizer"][name]
        assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == p.shape
        assert moments["exp_avg"].dtype == torch.float32 and moments["step"] == 30
    assert not any("module." in name or "_orig_mod" in name for name in state["model"])


def test_micro_batches_change_nothing_but_rounding(toy, undisturbed, tmp_path):
    assert run(toy, tmp_path / "run", "--micro_batch_size=2") == 0
    a, b = (events(out, "step") for out in (undisturbed, tmp_path / "run"))
    assert [e["loss"] for e in a] == pytest.approx([e["loss"] for e in b], abs=1e-4)
    assert [e["grad_norm"] for e in a] == pytest.approx([e["grad_norm"] for e in b], rel=1e-3)


def test_naive_restarts_rate_and_moments_at_its_prune(toy, tmp_path):
    out = tmp_path / "run"
    knobs = ["--prune_schedule=oneshot", "--lr_restart", "--n_kv_head_target=0"]
    assert run(toy, out, *knobs, "--save_every=7") == 0
    rates = {e["step"]: e["lr"] for e in events(out, "step")}
    assert rates[12] == min(rates.values()) and rates[15] == max(rates.values()) == rates[3]
    (event,) = events(out, "prune")
    assert (event["step"], event["width_before"], event["width_after"]) == (13, 32, 8)
    state = load_checkpoint(out / "checkpoint.pt")
    assert state["step"] == 30  # the last step is saved whatever the interval
    assert {m["step"].item() for m in state["optimizer"].values()} == {30 - 12}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_keeps_weights_moments_and_scores_in_float32(
    dtype, toy, undisturbed, tmp_path
):
    assert run(toy, tmp_path / "run", f"--dtype={dtype}") == 0
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    tensors = [*state["model"].values(), *state["scores"].values()]
    tensors += [t for moments in state["optimizer"].values() for t in moments.values()]
    assert {t.dtype for t in tensors} == {torch.float32}
    assert all(t.isfinite().all() for t in tensors)
    losses, exact = (
        [e["loss"] for e in events(o, "step")] for o in (tmp_path / "run", undisturbed)
    )
    assert losses == pytest.approx(exact, abs=0.05)
    assert sum(a != b for a, b in zip(losses, exact)) > 20  # the products are in lower precision


def test_gradients_that_always_overflow_float16_stop_the_run(toy, tmp_path, monkeypatch, capsys):
    total_norm = torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda g: total_norm(g) * torch.inf)
    assert run(toy, tmp_path / "run", "--dtype=float16", "--max_steps=90") == 1
    assert "overflow float16" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(toy, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    fsync = os.fsync
    calls = iter(range(1000))

    def full_after_some(descriptor):
        if next(calls) > 10:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_after_some)
    assert run(toy, out) == 1
    assert "No space left" in capsys.readouterr().err
    assert load_checkpoint(out / "checkpoint.pt")["step"] > 0
    assert not list(out.glob("*.tmp"))


def test_no_prune_ends_in_eager_mode(toy, tmp_path, monkeypatch):
    """More shapes than torch's recompile limit, and every step's graph still runs compiled."""
    ran = []

    def backend(graph, inputs):
        def counted(*args):
            ran.append(graph)
            return graph(*args)

        return counted

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend=backend))
    knobs = ["--compile=on", "--d_ff=80", "--prune_every=1", "--n_kv_head_target=0"]
    assert run(toy, tmp_path / "run", *knobs) == 0
    assert len(events(tmp_path / "run", "prune")) > torch._dynamo.config.cache_size_limit
    assert len(ran) == 30


def test_activation_statistics_survive_compilation(toy, tmp_path, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend="eager"))
    knobs = ["--criterion=activation", "--n_kv_head_target=0"]
    assert run(toy, tmp_path / "eager", *knobs) == 0
    assert run(toy, tmp_path / "compiled", "--compile=on", *knobs) == 0
    a, b = (load_checkpoint(tmp_path / n / "checkpoint.pt") for n in ("eager", "compiled"))
    for name, expected in a["scores"].items():
        torch.testing.assert_close(b["scores"][name], expected)


def test_a_pruned_checkpoint_is_a_starting_point(toy, undisturbed, tmp_path):
    knobs = ["--d_ff_target=4", "--n_kv_head_target=0", "--learning_rate=1e-5", "--warmup_steps=0"]
    start = f"--init_from={undisturbed / 'checkpoint.pt'}"
    assert run(toy, tmp_path / "run", start, *knobs) == 0
    assert run(toy, tmp_path / "run", start + "-gone", *knobs, "--resume") == 0  # needed once only
    first, last = events(tmp_path / "run", "step")[0], events(tmp_path / "run", "step")[-1]
    assert (first["d_ff"], first["n_kv_head"], last["d_ff"]) == (8, 1, 4)
    assert first["loss"] == pytest.approx(events(undisturbed, "step")[-1]["loss"], abs=0.3)


def test_a_run_can_be_sampled_and_drawn(undisturbed, tmp_path, capsys):
    capsys.readouterr()
    assert sample.main([str(undisturbed), "--prompt", "The sum of", "--tokens", "20"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("The sum of") and len(first) > 15
    assert sample.main([str(undisturbed), "--prompt", "The sum of", "--tokens", "20"]) == 0
    assert capsys.readouterr().out == first
    assert sample.main([str(tmp_path)]) == 2 and str(tmp_path) in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    from tools import plot

    assert plot.main([str(undisturbed), "--to", str(tmp_path / "run.png")]) == 0
    assert (tmp_path / "run.png").stat().st_size > 10_000
