"""Whatever happens to the process or the disk: no saved step is lost, and nothing wrong stays."""

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from test_run import (
    ROOT,
    events,
    run,
    same_end,
    stop_at,
    toy,  # noqa: F401
    undisturbed,  # noqa: F401
    wait_until,
)

import train as train_module
from run.checkpoint import CheckpointError, load_checkpoint, write_checkpoint
from tools import evaluate, export, sample

TRAIN = [sys.executable, "train.py"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


ENDLESS = "--max_steps=1000000000000"  # no machine gets there: such a run ends when it is told to

# As train.py, but killed, as from outside, when it comes to a place for the nth time: an import, a
# file that is opened or renamed, half of a checkpoint, half of a line of the log. With `work` it is
# killed a little later, wherever it is by then; not after its end, as Python waits for a thread.
DYING = """
import io, os, signal, sys, threading, types
place, nth, work = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
del sys.argv[1:4]
sys.path.insert(0, os.getcwd())

def die():
    for _ in range(work):
        pass
    os.kill(os.getpid(), signal.SIGKILL)

def come_to(here):
    global nth
    if here == place:
        nth -= 1
        if nth == 0:
            threading.Thread(target=die).start() if work else die()

def in_halves(write, data, name):
    half = len(data) // 2
    write(data[:half])
    come_to("half " + name)
    write(data[half:])
    return len(data)

def audit(event, arguments):
    if event in ("import", "open", "os.rename"):
        come_to(f"{event} {os.path.basename(str(arguments[0]))}")

def save(state, file):
    whole = io.BytesIO()
    save_whole(state, whole)
    in_halves(lambda part: (file.write(part), file.flush()), whole.getvalue(), "checkpoint")

def write(log, event, **values):
    file = log.file
    log.file = types.SimpleNamespace(write=lambda line: in_halves(file.write, line, event))
    write_whole(log, event, **values)
    log.file = file

sys.addaudithook(audit)
import torch, train
from run import checkpoint
save_whole, torch.save = torch.save, save
write_whole, checkpoint.Log.write = checkpoint.Log.write, write
sys.exit(train.main())
"""

# Where a run may die, and how often an undisturbed one comes there, at least.
PLACES = {
    "import train": 1, "open lock": 1, "os.rename config.json.tmp": 1, "os.rename log.jsonl.tmp": 1,
    "open log.jsonl": 1, "half start": 1, "half step": 30, "half prune": 6, "half eval": 3,
    "open checkpoint.pt.tmp": 6, "half checkpoint": 6, "os.rename checkpoint.pt": 5,
    "os.rename checkpoint.pt.tmp": 6, "half save": 6, "half done": 1,
}  # fmt: skip


def start(command: list, config: Path, out: Path, *more: str, **to) -> subprocess.Popen:
    command = [*map(str, command), str(config), f"--out_dir={out}", "--resume", *more]
    out_err = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | to
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **out_err)


def die_at(place: str, nth: int, work: int, config: Path, out: Path) -> int:
    """The exit code of a run that dies there, or ends before."""
    script = out.with_name("dying.py")
    script.write_text(DYING)
    return start([sys.executable, script, place, nth, work], config, out).wait()


def assert_same_as(undisturbed: Path, out: Path) -> None:  # noqa: F811
    assert same_end(out, undisturbed)
    assert [e["step"] for e in events(out, "step")] == list(range(1, 31))
    assert len(events(out, "done")) == 1


def test_killed_in_its_start_a_line_and_a_save_the_same_command_ends_in_the_same_bytes(
    toy, undisturbed, tmp_path  # noqa: F811
):  # fmt: skip
    out, kept = tmp_path / "run", {"lock", "config.json"}
    kept_and_saved = kept | {"log.jsonl", "checkpoint.prev.pt", "checkpoint.pt.tmp"}
    for place, nth, left in (
        ("os.rename log.jsonl.tmp", 1, kept | {"log.jsonl.tmp"}),
        ("half step", 8, kept | {"log.jsonl", "checkpoint.pt"}),
        ("half checkpoint", 2, kept_and_saved | {"checkpoint.pt"}),
        ("os.rename checkpoint.pt.tmp", 1, kept_and_saved),  # between the two renames of a save
    ):
        assert die_at(place, nth, 0, toy, out) == -signal.SIGKILL
        assert {path.name for path in out.iterdir()} == left
    assert start(TRAIN, toy, out).wait() == 0
    assert_same_as(undisturbed, out)


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_ends_in_the_same_bytes(toy, undisturbed, tmp_path):  # noqa: F811
    chance, kills, code = random.Random(1), 0, 0
    for round in range(50):  # the first attempt of each is killed, so 50 are enough
        out = tmp_path / f"run{round}"
        while kills < 50:
            place = chance.choice(list(PLACES))
            work = chance.choice([0, chance.randrange(10**6)])
            code = die_at(place, chance.randint(1, PLACES[place]), work, toy, out)
            if code == 0:
                break
            assert code == -signal.SIGKILL
            kills += 1
        if code:
            assert start(TRAIN, toy, out).wait() == 0
        assert_same_as(undisturbed, out)
        if kills == 50:
            return
    pytest.fail(f"only {kills} kills in 50 rounds")


def has_logged(out: Path, name: str) -> bool:
    log = out / "log.jsonl"
    return log.exists() and f'"event": "{name}"' in log.read_text(errors="replace")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    toy, undisturbed, tmp_path, monkeypatch, capsys  # noqa: F811
):  # fmt: skip
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_at(patched, 18)
        run(toy, out)
    path = out / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    assert run(toy, out, "--resume") == 0
    error = capsys.readouterr().err
    assert str(path) in error and "checkpoint.prev.pt, step 15" in error
    assert same_end(out, undisturbed)
    assert [e["step"] for e in events(out, "step")] == list(range(1, 31))
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        (out / name).write_bytes(b"nothing")
    assert run(toy, out, "--resume") == 2


def test_a_flipped_bit_is_found(undisturbed, tmp_path):  # noqa: F811
    whole = (undisturbed / "checkpoint.pt").read_bytes()
    expected = load_checkpoint(undisturbed / "checkpoint.pt")
    path, chance, refused = tmp_path / "checkpoint.pt", random.Random(2), 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            state = load_checkpoint(path)
        except CheckpointError:
            refused += 1
            continue
        for name, weight in expected["model"].items():  # the bit was padding, or a date
            assert torch.equal(state["model"][name], weight)
    assert refused > 40


@pytest.mark.parametrize("damaged", [False, True])
def test_killed_between_the_two_renames_of_a_save_a_whole_checkpoint_is_there(
    damaged, toy, undisturbed, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_at(patched, 18)
        run(toy, out)
    path, before, replace = out / "checkpoint.pt", out / "checkpoint.prev.pt", os.replace
    if damaged:
        path.write_bytes(path.read_bytes()[:-1000])

    def killed(old, new):
        if Path(old).name == "checkpoint.pt.tmp":
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        assert run(toy, out, "--resume") == 128 + signal.SIGINT
    assert not path.exists() and load_checkpoint(before)["step"] == (15 if damaged else 18)
    assert run(toy, out, "--resume") == 0
    assert same_end(out, undisturbed)


def test_who_reads_a_damaged_checkpoint_names_the_one_before_it_and_how_to_go_on(
    toy, undisturbed, tmp_path, capsys  # noqa: F811
):  # fmt: skip
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    path, before = out / "checkpoint.pt", out / "checkpoint.prev.pt"
    path.write_bytes(path.read_bytes()[:-1000])

    def refused(*words: str) -> None:
        for main, *arguments in (
            (sample.main, out),
            (export.main, out, f"--to={tmp_path / 'folder'}"),
            (evaluate.main, out, f"--text={toy}"),
            (train_module.main, toy, f"--out_dir={tmp_path / 'new'}", f"--init_from={path}"),
        ):
            capsys.readouterr()
            assert main([str(argument) for argument in arguments]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1, error
            assert all(word in error for word in (str(path), str(before), *words)), error

    refused("step 25", f"python train.py {out} --resume")
    before.write_bytes(b"nothing")
    refused("damaged")
    assert run(toy, out, "--resume") == 2
    error = capsys.readouterr().err
    assert str(path) in error and str(before) in error and error.count("\n") == 1


def test_a_compressed_bomb_is_refused_unopened(undisturbed, tmp_path):  # noqa: F811
    path = tmp_path / "checkpoint.pt"
    with (
        zipfile.ZipFile(undisturbed / "checkpoint.pt") as whole,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for part in whole.namelist():
            bomb.writestr(part, whole.read(part))
        bomb.writestr("checkpoint/data/9999", bytes(50_000_000))
    assert path.stat().st_size < 1_000_000
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="checkpoint.pt"):
        load_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def file_size_limit(size: int) -> None:
    """A disk that is full, as far as a process can tell: no file may grow past `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.fixture
def small_disk_between(monkeypatch):
    """From one step of the run to another no file may grow past 40 kB, so no checkpoint fits."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def between(first: int, last: int) -> None:
        save = train_module.save_checkpoint

        def limited(*args):
            if first <= args[-1]["step"] <= last:
                file_size_limit(40_000)
            try:
                save(*args)
            finally:
                file_size_limit(resource.RLIM_INFINITY)

        monkeypatch.setattr(train_module, "save_checkpoint", limited)

    yield between
    file_size_limit(resource.RLIM_INFINITY)
    signal.signal(signal.SIGXFSZ, before)


def test_on_a_full_disk_the_run_goes_on_and_saves_when_it_can(
    toy, undisturbed, tmp_path, small_disk_between, capsys  # noqa: F811
):  # fmt: skip
    out = tmp_path / "run"
    small_disk_between(10, 20)
    assert run(toy, out) == 0
    assert same_end(out, undisturbed)
    saves = events(out, "save")
    assert [e["step"] for e in saves if "error" in e] == [10, 15, 20]
    assert "trying again" in capsys.readouterr().out
    assert not list(out.glob("*.tmp"))


def test_a_last_save_that_fails_is_exit_1_and_the_one_before_stays(
    toy, tmp_path, small_disk_between, capsys  # noqa: F811
):  # fmt: skip
    out = tmp_path / "run"
    small_disk_between(26, 30)
    assert run(toy, out) == 1
    assert str(out / "checkpoint.pt") in capsys.readouterr().err
    assert load_checkpoint(out / "checkpoint.pt")["step"] == 25


def test_a_second_process_is_refused_while_the_first_lives(toy, undisturbed, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "run"
    process = start(TRAIN, toy, out, ENDLESS)
    wait_until(process, lambda: has_logged(out, "step"))
    log = (out / "log.jsonl").read_bytes()
    assert run(toy, out, ENDLESS, "--resume", "--stop_after=1") == 2
    assert "another process" in capsys.readouterr().err
    assert (out / "log.jsonl").read_bytes().startswith(log)
    process.kill()
    process.wait()
    assert run(toy, out, "--overwrite") == 0  # the lock died with its holder
    assert same_end(out, undisturbed)


# As train.py, but the step after its second save does not end; it tells when it got a signal.
STUCK = """
import os, pathlib, sys, time
sys.path.insert(0, os.getcwd())
import train
from run import machine
here, save, ask, saves = pathlib.Path(__file__), train.save_checkpoint, machine.Stop.ask, []

def forward(self, *arguments):
    if len(saves) == 2:
        here.with_name("stuck").touch()
        time.sleep(10**6)
    return GPT_forward(self, *arguments)

def save_and_count(*arguments):
    save(*arguments)
    saves.append(1)

def ask_and_tell(*arguments):
    ask(*arguments)
    here.with_name("asked").touch()

GPT_forward, train.GPT.forward = train.GPT.forward, forward
train.save_checkpoint, machine.Stop.ask = save_and_count, ask_and_tell
sys.exit(train.main())
"""


def test_a_second_signal_leaves_at_once_and_the_checkpoint_is_whole(toy, tmp_path):  # noqa: F811
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    process = start([sys.executable, script], toy, tmp_path / "run")
    for told in ("stuck", "asked"):
        wait_until(process, (tmp_path / told).exists)
        process.send_signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 10


def diverge_at(monkeypatch, bad_steps: set[int]) -> None:
    forward, calls = train_module.GPT.forward, iter(range(1, 10_000))

    def diverge(self, tokens, targets=None):
        loss = forward(self, tokens, targets)
        return loss * torch.nan if self.training and next(calls) in bad_steps else loss

    monkeypatch.setattr(train_module.GPT, "forward", diverge)


def test_skipped_steps_are_counted_logged_and_leave_the_weights_alone(toy, tmp_path, monkeypatch):  # noqa: F811
    out = tmp_path / "run"
    diverge_at(monkeypatch, {4, 9, 20})
    assert run(toy, out, "--on_nonfinite=skip") == 0
    assert [e["skipped"] for e in events(out, "step")] == [0] * 3 + [1] * 5 + [2] * 11 + [3] * 11
    state = load_checkpoint(out / "checkpoint.pt")
    assert state["skipped"] == 3
    assert all(weight.isfinite().all() for weight in state["model"].values())
    assert {m["step"].item() for m in state["optimizer"].values()} == {27}


def test_a_run_whose_first_steps_were_skipped_goes_on(toy, tmp_path, monkeypatch):  # noqa: F811
    broken = lambda parameters: torch.tensor(math.nan)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "get_total_norm", broken)
        assert run(toy, tmp_path / "a", "--on_nonfinite=skip", "--stop_after=2") == 0
    assert run(toy, tmp_path / "a", "--on_nonfinite=skip", "--resume") == 0


def test_weights_that_are_not_finite_are_named_before_they_are_used(
    toy, undisturbed, tmp_path, capsys  # noqa: F811
):  # fmt: skip
    out, path = tmp_path / "broken", tmp_path / "broken" / "checkpoint.pt"
    state = load_checkpoint(undisturbed / "checkpoint.pt")
    state["model"]["blocks.1.ffn.up.weight"][2, 3] = math.inf
    state["config"] = json.dumps(state["config"])
    state["model_config"] = json.dumps(vars(state["model_config"]))
    out.mkdir()
    write_checkpoint(path, state)
    capsys.readouterr()
    codes = [sample.main([str(out)]), run(toy, tmp_path / "run", f"--init_from={path}")]
    errors = capsys.readouterr().err.splitlines()
    assert codes == [2, 2] and len(errors) == 2
    why = "its weights are not finite (blocks.1.ffn.up.weight)"
    assert all(str(out) in error and why in error for error in errors)
    assert not (tmp_path / "run").exists()


def test_skipping_is_bounded(toy, tmp_path, monkeypatch, capsys):  # noqa: F811
    diverge_at(monkeypatch, set(range(5, 1000)))
    assert run(toy, tmp_path / "run", "--on_nonfinite=skip", "--max_steps=200") == 1
    assert "step 55" in capsys.readouterr().err


def test_out_of_memory_names_the_micro_batch_to_try(toy, tmp_path, monkeypatch, capsys):  # noqa: F811
    def full(self, tokens, targets=None):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )

    monkeypatch.setattr(train_module.GPT, "forward", full)
    assert run(toy, tmp_path / "run", "--micro_batch_size=8") == 1
    assert "--micro_batch_size=4" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_memory_and_file_handles_stay_flat(steps, toy, tmp_path):  # noqa: F811
    """50 saves, 100 validations and 20 prunes in a run, against the same run half as long."""

    def cost(steps: int, interval: int) -> tuple[int, int]:
        knobs = [f"--max_steps={steps}", "--d_ff=88", "--prune_every=1", "--n_kv_head_target=0"]
        knobs += [f"--eval_every={interval}", f"--save_every={2 * interval}"]
        knobs += [f"--out_dir={tmp_path / str(steps)}"]
        code = (
            "import os, resource, sys, train\n"
            f"assert train.main([{str(toy)!r}, *{knobs!r}]) == 0\n"
            "pages = int(open('/proc/self/statm').read().split()[1])\n"
            "print('cost', pages * resource.getpagesize(), len(os.listdir('/proc/self/fd')))\n"
        )
        output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
        return tuple(int(n) for n in output.split()[-2:])

    interval = steps // 100
    (memory, handles), (more_memory, more_handles) = (
        cost(n, interval) for n in (steps // 2, steps)
    )
    assert len(events(tmp_path / str(steps), "save")) == 50
    assert len(events(tmp_path / str(steps), "eval")) == 100
    assert len(events(tmp_path / str(steps), "prune")) >= 18
    assert more_handles == handles
    assert more_memory < memory + 10_000_000
