"""Whatever happens to the process or the disk: no saved step is lost, and nothing wrong stays."""

import io
import json
import os
import shutil
import sys
import zipfile

import pytest
import torch
from helpers import events, run, same_end

import train
from model import GPT
from run.checkpoint import load_checkpoint
from run.log import read_log
from tools import page, plan, sample

# train.py, killed when it comes to a place for the nth time: before a file is renamed, half written
DYING = """
import io
place, nth = sys.argv.pop(1), int(sys.argv.pop(1))

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

import run.checkpoint, run.log
run.checkpoint.open = run.log.open = lambda path, mode, **_: InHalves(path, mode)
sys.addaudithook(lambda event, args: event == "os.rename" and come_to("rename", str(args[0])))
sys.exit(train.main())
"""
OUTPUT = [  # as before `| head`; closed, as Python finds it then; where ascii is all
    "r, w = os.pipe(); os.close(r); sys.stdout = open(w, 'w')",
    "os.close(1); sys.stdout = None",
    "sys.stdout.reconfigure(encoding='ascii')",
]
WRONG = {  # as another edition of the code, or a model.py that somebody changed, leaves it
    "format": [None, "enlarge-prune 1"],
    "config": ["", {"seed": None}],
    "model_config": ["{}", {"d_ff": 10**12}, {"rope": 1}],  # no weight of this size is made
    "model": [None, {"other.weight": torch.zeros(3)}, {"embed.weight": torch.zeros(3)}],
    "data": [None, "of another text"],
}


class Full(io.FileIO):
    def write(self, data):
        raise OSError(28, "No space left on device")


class Malicious:
    def __reduce__(self):
        return (sys.exit, ())


def test_killed_again_and_again_a_run_ends_in_the_same_bytes(processes, toy, undisturbed, tmp_path):
    """In its start, a line of the log, a save, between prunes. `last`: of the log's whole lines."""
    for place, nth, *last in (
        ("rename log.jsonl.tmp", 1),
        ("half log.jsonl", 10, ("step", 7, None)),
        ("half checkpoint.pt.tmp", 200, ("eval", 10, None)),
        ("rename checkpoint.pt.tmp", 1, ("eval", 10, None)),
        ("half log.jsonl", 21, ("prune", 17, "d_model")),  # among prunes of four kinds
    ):
        dying = (DYING, place, nth, toy, f"--out_dir={tmp_path}", "--resume")
        assert processes(*dying)[0] == [9]
        whole = [(e["event"], e["step"], e.get("kind")) for e in read_log(tmp_path)]
        assert whole[-1:] == last
    assert run(toy, tmp_path, "--resume") == 0
    assert same_end(tmp_path, undisturbed)
    assert [e["step"] for e in events(tmp_path, "step")] == list(range(1, 31))
    assert len(events(tmp_path, "done")) == 1


def test_a_damaged_checkpoint_is_refused_in_one_line(
    toy, undisturbed, tmp_path, refused, monkeypatch
):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    whole = (path := out / "checkpoint.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(load_checkpoint(path)["model"]["norm.weight"].numpy().tobytes())] ^= 1
    for content in (whole[:-1000], flipped):
        path.write_bytes(content)
        refused(f"{path}: ", out, main=sample.main)
        refused(f"{path}: ", toy, f"--out_dir={tmp_path / 'new'}", f"--init_from={path}")
        refused(f"{path}: ", toy, f"--out_dir={out}", "--resume")
    monkeypatch.setenv("LOCAL_RANK", "1")  # only the first rank of a machine compares the sums
    assert load_checkpoint(path)["step"] == 30


@pytest.mark.parametrize("part", WRONG)
def test_whatever_is_wrong_in_a_checkpoint_is_one_line(part, toy, undisturbed, tmp_path, refused):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    path, state = out / "checkpoint.pt", torch.load(undisturbed / "checkpoint.pt")
    for bad in (*WRONG[part], Malicious()):  # whose code does not run
        if isinstance(bad, dict):
            whole = state[part]
            bad = json.dumps(json.loads(whole) | bad) if isinstance(whole, str) else whole | bad
        torch.save(state | {part: bad}, path)
        refused(f"{path}: ", toy, f"--out_dir={out}", "--resume")


def test_a_checkpoint_is_no_code_whoever_names_it(undisturbed, tmp_path, refused):
    path = shutil.copy(undisturbed / "checkpoint.pt", tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__main__.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    for main in (train.main, plan.main):
        refused(f"looked in {tmp_path}", path, main=main)
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows makes no links without rights")
def test_no_link_in_a_folder_leads_a_run_out_of_it(toy, tmp_path, refused):
    (theirs := tmp_path / "theirs").write_text("theirs")
    (out := tmp_path / "run").mkdir()
    for name in ("checkpoint.pt", "config.json", "log.jsonl"):
        (out / f"{name}.tmp").symlink_to(theirs)
    assert run(toy, out, "--stop_after=1") == 0
    (out / "page.html").symlink_to(theirs)
    assert page.main([str(out)]) == 0
    assert theirs.read_text() == "theirs" and not list(out.glob("*.tmp"))
    (out / "lock").unlink()
    (out / "lock").symlink_to(tmp_path / "none")
    refused("lock", toy, f"--out_dir={out}", "--resume")
    assert not (tmp_path / "none").exists()


def test_no_run_begins_again_whose_checkpoint_is_gone(toy, undisturbed, tmp_path, refused):
    out = shutil.copytree(undisturbed, tmp_path / "run", ignore=lambda *_: ["checkpoint.pt"])
    refused("checkpoint is gone", toy, f"--out_dir={out}", "--resume")


@pytest.mark.parametrize("key", ["init_from", "teacher"])
def test_no_run_writes_over_the_weights_it_learns_from(key, toy, undisturbed, refused):
    for path in (undisturbed, undisturbed / "checkpoint.pt"):
        refused(f"{key}=", toy, f"--out_dir={undisturbed}", f"--{key}={path}", "--overwrite")


@pytest.mark.parametrize("module, nth, saved", [("log", 3, []), ("checkpoint", 5, [5, 10])])
def test_a_full_disk_ends_a_run_in_one_line_and_resume_goes_on(
    module, nth, saved, toy, undisturbed, tmp_path, monkeypatch, capsys
):
    opened = []

    def on_a_full_disk(path, mode):  # it is full when the module opens its nth file
        opened.append(path)
        return (open if len(opened) < nth else Full)(path, mode)

    with monkeypatch.context() as patched:
        patched.setattr(f"run.{module}.open", on_a_full_disk, raising=False)
        assert run(toy, tmp_path) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space" in error and not list(tmp_path.glob("*.tmp"))
    assert [e["step"] for e in events(tmp_path, "save")] == saved
    assert not saved or load_checkpoint(tmp_path / "checkpoint.pt")["step"] == saved[-1]
    assert run(toy, tmp_path, "--resume") == 0
    assert same_end(tmp_path, undisturbed)


@pytest.mark.parametrize("way", OUTPUT)
def test_whatever_its_standard_output_is_a_command_does_its_work(way, processes, toy, tmp_path):
    out = tmp_path / os.fsdecode("größe".encode())  # as a shell gives it, in any locale
    for module, *arguments in (
        ("train", toy, f"--out_dir={out}", "--stop_after=2"),
        ("tools.sample", out, f"--prompt={out.name}", "--tokens=1"),
    ):
        code = f"{way}; import {module}; sys.exit(sys.modules[{module!r}].main())"
        assert processes(code, *arguments) == ([0], "")
    assert load_checkpoint(out / "checkpoint.pt")["step"] == 2


def test_a_second_run_in_a_folder_is_refused_from_the_start(toy, tmp_path, monkeypatch, refused):
    def build(shape):  # the first still builds its model
        monkeypatch.setattr(train, "GPT", GPT)
        refused(f"out_dir={tmp_path}", toy, f"--out_dir={tmp_path}", "--overwrite")
        return GPT(shape)

    monkeypatch.setattr(train, "GPT", build)
    assert run(toy, tmp_path, "--stop_after=1") == 0 and train.GPT is GPT
