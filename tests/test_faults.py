"""Whatever happens to the process or the disk: no saved step is lost, and nothing wrong stays."""

import functools
import math
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, events, run, same_end, wait_until

import train as train_module
from model import UNITS
from run import UserError, report
from run.checkpoint import load_checkpoint
from run.folder import read_log
from tools import evaluate, export, sample

# As train.py, but gets a signal, twice, when it comes to a place for the nth time: a file that is
# opened or renamed, half of a write. With `work` it comes a little later, wherever it is by then;
# not after its end, as Python waits for a thread.
DYING = """
import io, os, sys, threading
sys.path.insert(0, os.getcwd())
place, (nth, work, number) = sys.argv[1], map(int, sys.argv[2:5])
del sys.argv[1:5]

def die():
    for _ in range(work):
        pass
    for _ in range(2):
        os.kill(os.getpid(), number)

def come_to(event, path):
    global nth
    if f"{event} {os.path.basename(path)}" == place:
        nth -= 1
        if nth == 0:
            threading.Thread(target=die).start() if work else die()

class InHalves(io.FileIO):
    def write(self, data):
        data = memoryview(data)
        half = super().write(data[: len(data) // 2])
        come_to("half", self.name)
        return half + super().write(data[half:])

def audit(event, arguments):
    if event in ("open", "os.rename"):
        come_to(event, str(arguments[0]))

import run.checkpoint, run.folder, train
run.checkpoint.open = run.folder.open = lambda path, mode, **_: InHalves(path, mode)
sys.addaudithook(audit)
sys.exit(train.main())
"""

# Where a run may die, and how often an undisturbed one comes there, at least.
PLACES = {
    "open meta.json": 1, "open lock": 1, "half config.json.tmp": 1, "os.rename config.json.tmp": 1,
    "os.rename log.jsonl.tmp": 1, "half log.jsonl": 45, "open checkpoint.pt.tmp": 6,
    "half checkpoint.pt.tmp": 2700, "os.rename checkpoint.pt": 5, "os.rename checkpoint.pt.tmp": 6,
}  # fmt: skip


def die_at(place: str, nth: int, config: Path, out: Path, work=0, number=signal.SIGKILL):
    """A run that dies there, or ends before."""
    script = out.with_name("dying.py")
    script.write_text(DYING)
    command = [sys.executable, script, place, nth, work, int(number), config, f"--out_dir={out}"]
    command = [*map(str, command), "--resume"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def assert_same_as(undisturbed: Path, out: Path) -> None:
    assert same_end(out, undisturbed)
    assert [e["step"] for e in events(out, "step")] == list(range(1, 31))
    assert len(events(out, "done")) == 1


def test_killed_in_its_start_a_line_a_save_and_a_prune_the_same_command_ends_in_the_same_bytes(
    toy, undisturbed, tmp_path
):
    """And a second signal ends it at once; the first one alone would end it with a save.

    `last`: what the log has as its last whole line, its event, step and kind of unit.
    """
    out, kept, kill = tmp_path / "run", {"lock", "config.json"}, signal.SIGKILL
    saved = kept | {"log.jsonl", "checkpoint.pt"}
    saving = kept | {"log.jsonl", "checkpoint.prev.pt", "checkpoint.pt.tmp"}
    both = saved | {"checkpoint.prev.pt"}
    for place, nth, number, left, *last in (
        ("os.rename log.jsonl.tmp", 1, kill, kept | {"log.jsonl.tmp"}),
        ("half log.jsonl", 10, kill, saved, ("step", 7, None)),
        ("half log.jsonl", 3, signal.SIGTERM, saved, ("step", 6, None)),
        ("half checkpoint.pt.tmp", 200, kill, saved | {"checkpoint.pt.tmp"}, ("eval", 10, None)),
        # Between the two renames of a save
        ("os.rename checkpoint.pt.tmp", 1, kill, saving, ("eval", 10, None)),
        # Among the prunes of four kinds, from step 5; in a save after them; and again, from 15
        ("half log.jsonl", 21, kill, both, ("prune", 17, "d_model")),
        ("half checkpoint.pt.tmp", 200, kill, both | {"checkpoint.pt.tmp"}, ("eval", 20, None)),
        ("half log.jsonl", 21, kill, both, ("prune", 25, "d_model")),
    ):
        assert die_at(place, nth, toy, out, number=number).returncode == -number
        assert {path.name for path in out.iterdir()} == left
        whole = [(e["event"], e["step"], e.get("group")) for e in read_log(out)]
        assert whole[-1:] == last
    assert run(toy, out, "--resume") == 0
    assert_same_as(undisturbed, out)


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_ends_in_the_same_bytes(toy, undisturbed, tmp_path):
    chance, kills, rounds = random.Random(1), 0, 0
    while kills < 50:
        out, code = tmp_path / f"run{rounds}", -signal.SIGKILL
        while code and kills < 50:
            place, most = chance.choice(list(PLACES.items()))
            work = chance.choice([0, chance.randrange(10**6)])
            code = die_at(place, chance.randint(1, most), toy, out, work).returncode
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
        assert run(toy, out, "--resume") == 0
        assert_same_as(undisturbed, out)
        rounds += 1


def test_a_damaged_checkpoint_is_named_the_one_before_it_used_and_the_damaged_one_never_kept(
    toy, undisturbed, tmp_path
):
    out = tmp_path / "run"
    path, before = out / "checkpoint.pt", out / "checkpoint.prev.pt"
    assert run(toy, out, "--stop_after=18") == 0
    path.write_bytes(path.read_bytes()[:-1000])
    error = die_at("os.rename checkpoint.pt.tmp", 1, toy, out).stderr
    assert f"{path}: not a checkpoint" in error and f"going on from {before}, step 15" in error
    assert not path.exists() and load_checkpoint(before)["step"] == 15
    assert run(toy, out, "--resume") == 0
    assert_same_as(undisturbed, out)


def test_a_flipped_bit_is_found(undisturbed, tmp_path):
    path, chance, refused = tmp_path / "checkpoint.pt", random.Random(2), 0
    whole = (undisturbed / "checkpoint.pt").read_bytes()
    expected = load_checkpoint(undisturbed / "checkpoint.pt")["model"]
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            torch.testing.assert_close(load_checkpoint(path)["model"], expected, rtol=0, atol=0)
        except UserError:
            refused += 1
    assert refused > 40  # of the others, the bit was padding, or a date


def test_who_reads_a_damaged_checkpoint_names_the_one_before_it_and_how_to_go_on(
    toy, undisturbed, tmp_path, capsys
):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    path, before = out / "checkpoint.pt", out / "checkpoint.prev.pt"
    path.write_bytes(path.read_bytes()[:-1000])

    readers = [
        (sample.main, out),
        (export.main, out, f"--to={tmp_path / 'folder'}"),
        (evaluate.main, out, f"--text={toy}"),
        (train_module.main, toy, f"--out_dir={tmp_path / 'new'}", f"--init_from={path}"),
    ]
    for words in (("step 25", f"python train.py {out} --resume"), ("damaged",)):
        for main, *arguments in readers:
            capsys.readouterr()
            assert main([str(argument) for argument in arguments]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1, error
            assert all(word in error for word in (str(path), str(before), *words)), error
        before.write_bytes(b"nothing")
        readers.append((train_module.main, toy, f"--out_dir={out}", "--resume"))


def test_on_a_full_disk_the_run_goes_on_saves_when_it_can_and_a_last_save_that_fails_is_exit_1(
    toy, undisturbed, tmp_path, monkeypatch, capsys
):
    out, save = tmp_path / "run", report.save_checkpoint

    def full(full: bool) -> None:  # as far as a process can tell: no file may grow
        limit = 1 if full else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def save_on_a_small_disk(c, step, *rest):
        full(10 <= step <= 20 or step == 30)
        save(c, step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(report, "save_checkpoint", save_on_a_small_disk)
        try:
            assert run(toy, out) == 1
        finally:
            full(False)
    said, error = capsys.readouterr()
    assert said.count("trying again") == 3 and str(out / "checkpoint.pt") in error
    assert [e["step"] for e in events(out, "save") if "error" in e] == [10, 15, 20]
    assert [e["step"] for e in events(out, "step")] == list(range(1, 31))
    assert load_checkpoint(out / "checkpoint.pt")["step"] == 25 and not list(out.glob("*.tmp"))
    assert run(toy, out, "--resume") == 0
    assert_same_as(undisturbed, out)


def test_a_second_process_is_refused_while_the_first_lives(toy, undisturbed, tmp_path, capsys):
    out, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    endless = "--max_steps=1000000000000"
    command = [sys.executable, "train.py", str(toy), f"--out_dir={out}", endless]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_until(process, lambda: log.exists() and b'"event": "step"' in log.read_bytes())
    written = log.read_bytes()
    assert run(toy, out, endless, "--resume", "--stop_after=1") == 2
    assert "another process" in capsys.readouterr().err
    assert log.read_bytes().startswith(written)
    process.kill()
    process.wait()
    assert run(toy, out, "--overwrite") == 0  # the lock died with its holder
    assert same_end(out, undisturbed)


def test_weights_that_are_not_finite_are_named_before_they_are_used(
    toy, undisturbed, tmp_path, capsys
):
    path, new = tmp_path / "checkpoint.pt", tmp_path / "run"
    state = torch.load(undisturbed / "checkpoint.pt", weights_only=True)
    state["model"]["blocks.1.ffn.up.weight"][2, 3] = math.inf
    torch.save(state, path)
    capsys.readouterr()
    assert [sample.main([str(tmp_path)]), run(toy, new, f"--init_from={path}")] == [2, 2]
    errors = capsys.readouterr().err.splitlines()
    why = "its weights are not finite (blocks.1.ffn.up.weight)"
    assert len(errors) == 2 and all(str(tmp_path) in e and why in e for e in errors)
    assert not new.exists()


def test_out_of_memory_names_the_micro_batch_to_try(toy, tmp_path, monkeypatch, capsys):
    def full(self, tokens, targets=None):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(train_module.GPT, "forward", full)
    assert run(toy, tmp_path / "run", "--micro_batch_size=8") == 1
    assert "--micro_batch_size=4" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_memory_and_file_handles_stay_flat(steps, toy, tmp_path):
    """After a run with 25 saves, 50 validations and 20 prunes, one that is twice as long."""
    knobs = ["--d_ff=88", "--prune_every=1", "--n_kv_head_target=0", f"--out_dir={tmp_path}"]
    knobs += [f"--eval_every={steps // 100}", f"--save_every={steps // 50}", "--overwrite"]
    code = (
        "import gc, os, train\n"
        f"for steps in {steps // 2, steps}:\n"
        f"    assert train.main([{str(toy)!r}, *{knobs!r}, f'--max_steps={{steps}}']) == 0\n"
        "    gc.collect()\n"
        "    pages = int(open('/proc/self/statm').read().split()[1])\n"
        "    print('cost', pages * os.sysconf('SC_PAGE_SIZE'), len(os.listdir('/proc/self/fd')))\n"
    )
    output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    costs = [line.split()[1:] for line in output.splitlines() if line.startswith("cost")]
    (memory, handles), (more_memory, more_handles) = [map(int, cost) for cost in costs]
    assert (len(events(tmp_path, "save")), len(events(tmp_path, "eval"))) == (50, 100)
    assert len(events(tmp_path, "prune")) >= 18
    assert more_handles == handles and more_memory < memory + 10_000_000


def test_a_compiled_run_has_one_graph_for_all_blocks_and_widths_and_resumes_to_the_same_bytes(
    toy, tmp_path, monkeypatch
):
    graphs, knobs = [], ("--compile=on", "--n_kv_head_target=2")

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setenv("CXX", sys.executable)  # no C++ compiler is needed
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    for out, more in (("whole", ""), ("cut", "--stop_after=16"), ("cut", "--resume")):
        torch._dynamo.reset()  # what another process would know
        graphs.clear()
        assert run(toy, tmp_path / out, *knobs, *more.split()) == 0
        assert len(graphs) == 1
    prunes = [(e["step"], e["group"]) for e in events(tmp_path / "cut", "prune")]
    assert {kind for step, kind in prunes if step > 16} == set(UNITS)
    assert same_end(tmp_path / "cut", tmp_path / "whole")
