"""Whatever happens to the process or the disk: no saved step is lost."""

import io
import os
import shutil
import sys

import pytest
import torch
from helpers import events, run, same_end, train
from test_ranks import COMMAND, contents
from test_run import at_steps

from configs import read_log
from model import load_checkpoint

# train.py, killed when it comes to a place for the nth time: before a file is renamed,
# or when half of a write is done
DYING = """
import builtins, io
place = sys.argv.pop(1)
nth = int(sys.argv.pop(1))

def come_to(event, path):
    global nth
    nth -= f"{event} {os.path.basename(path)}" == place
    if nth == 0:
        os._exit(9)  # nothing more is written

class InHalves(io.FileIO):
    def write(self, data):
        data = memoryview(data)
        half = super().write(data[: len(data) // 2])
        come_to("half", self.name)
        return half + super().write(data[half:])

def open_in_halves(path, mode="r", **others):
    if mode in ("ab", "xb"):
        return InHalves(path, mode)
    return io.open(path, mode, **others)

def watch(event, arguments):
    if event == "os.rename":
        come_to("rename", str(arguments[0]))

builtins.open = open_in_halves
sys.addaudithook(watch)
sys.exit(train(*sys.argv[1:]))
"""
# Where a run is killed, and the last event in its log
KILLS = (
    ("rename config.json.tmp", 1, []),
    ("rename log.jsonl.tmp", 1, []),
    ("half log.jsonl", 10, [("step", 7, None)]),
    ("half checkpoint.pt.tmp", 200, [("eval", 10, None)]),
    ("rename checkpoint.pt.tmp", 1, [("eval", 10, None)]),
    ("half log.jsonl", 21, [("prune", 17, "d_model")]),  # among prunes of four kinds
)


def test_killed_anywhere_a_run_ends_the_same(processes, toy, undisturbed, tmp_path):
    for place, nth, last in KILLS:
        given = (place, nth, toy, f"--out_dir={tmp_path}", "--resume")
        assert processes(DYING, *given) == ([9], "")
        whole = [(e["event"], e["step"], e.get("kind")) for e in read_log(tmp_path)]
        assert whole[-1:] == last
    assert run(toy, tmp_path, "--resume") == 0
    assert same_end(tmp_path, undisturbed)
    assert [e["step"] for e in events(tmp_path, "step")] == list(range(1, 31))
    assert len(events(tmp_path, "done")) == 1


def no_space(*arguments, **others):
    raise OSError(28, "No space left on device")


def open_on_a_full_disk(path, mode="r", **others):
    if str(path).endswith("log.jsonl"):
        no_space()
    return io.FileIO(path, mode)


FULL = {
    "torch.save": no_space,
    "os.fsync": no_space,  # the system keeps data back until then
    "os.replace": no_space,
    "builtins.open": open_on_a_full_disk,
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_ends_a_run_in_one_line_and_resume_goes_on(
    name, toy, undisturbed, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patched:
        at_steps(patched, {12: lambda: patched.setattr(name, FULL[name])})
        assert run(toy, tmp_path) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "No space left" in error
    assert not list(tmp_path.glob("*.tmp"))
    assert [e["step"] for e in events(tmp_path, "save")] == [5, 10]
    assert load_checkpoint(tmp_path)["step"] == 10
    assert run(toy, tmp_path, "--resume") == 0
    assert same_end(tmp_path, undisturbed)


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "checkpoint.pt"])
def test_no_run_changes_a_file_of_another_program(name, toy, tmp_path, refused):
    theirs = b'{"model_type": "llama"}'  # as in a Hugging Face folder
    (tmp_path / name).write_bytes(theirs)
    refused(tmp_path, tmp_path, "--resume")
    for flag in ("--seed=1", "--resume", "--overwrite"):
        refused(tmp_path, toy, f"--out_dir={tmp_path}", flag)
    assert contents(tmp_path) == {name: theirs}


def test_a_second_run_in_a_folder_is_refused(toy, tmp_path, monkeypatch, refused):
    def start_another():
        before = contents(tmp_path)
        for flag in ("--resume", "--overwrite"):
            refused(f"out_dir={tmp_path}: another process is", tmp_path, flag)
        assert contents(tmp_path) == before

    at_steps(monkeypatch, {3: start_another})
    assert run(toy, tmp_path, "--stop_after=3") == 0
    assert train(tmp_path, "--resume", "--stop_after=4") == 0  # the lock is free again


class Malicious:
    def __reduce__(self):
        return (sys.exit, ())


WRONG = {
    "code": {"config": Malicious()},
    "a knob that is gone": {"config": {"keep": 3}},
    "another shape": {"model_config": {"d_ff": 10**12}},
    "another weight": {"model": {"other.weight": torch.zeros(3)}},
    "another width": {"model": {"embed.weight": torch.zeros(3)}},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_checkpoint_of_other_code_is_refused(wrong, undisturbed, tmp_path, refused):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    path = out / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    for part, value in wrong.items():
        state[part] = state[part] | value if isinstance(value, dict) else value
    torch.save(state, path)
    refused("checkpoint", out, "--resume")


def test_a_damaged_checkpoint_is_refused(toy, undisturbed, tmp_path, refused):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    path = out / "checkpoint.pt"
    whole = path.read_bytes()
    norm = load_checkpoint(path)["model"]["norm.weight"]
    flipped = bytearray(whole)
    flipped[whole.index(norm.numpy().tobytes())] ^= 1
    for content in (whole[:-1000], flipped, b""):
        path.write_bytes(content)
        before = contents(out)
        refused(f"{path}: damaged", out, "--resume")
        new = f"--out_dir={tmp_path / 'new'}"
        for key in ("init_from", "teacher"):
            refused(f"{path}: damaged", toy, new, f"--{key}={path}")
        assert contents(out) == before


OUTPUT = {
    "| head": "r, w = os.pipe(); os.close(r); sys.stdout = open(w, 'w')",
    "closed": "os.close(1); sys.stdout = None",  # as Python finds it then
    "ascii": "sys.stdout.reconfigure(encoding='ascii')",
}


@pytest.mark.parametrize("output", OUTPUT.values(), ids=OUTPUT)
def test_a_run_goes_on_whatever_its_output_is(output, processes, toy, tmp_path):
    out = tmp_path / os.fsdecode("größe".encode())  # as a shell gives it, in any locale
    code = f"{output}\n{COMMAND}"
    given = (toy, f"--out_dir={out}", "--stop_after=2")
    assert processes(code, *given) == ([0], "")
    assert load_checkpoint(out)["step"] == 2
