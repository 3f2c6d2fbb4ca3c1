"""Every change of docs/course.md, read from the page, applied to a copy of the project and run."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from helpers import ROOT, events

PAGE = (ROOT / "docs/course.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"```diff\n *# ([\w/.]+)\n(.*?)```", PAGE, re.S)
RUNS = re.findall(r"^ *(python train\.py .*)$", PAGE, re.M)
# 80 steps of 4 x 16 tokens, with seven prunes in steps 11 to 29
SHORT = ["--shorter=50", "--batch_size=4", "--context_length=16", "--eval_tokens=500"]
SHORT += ["--device=cpu", "--dtype=float32", "--compile=off"]
KINDS = ("d_ff", "n_kv_head", "d_model", "n_layer")


def apply(diff: str, path: Path) -> None:
    """What a reader does: replace the lines with a minus; where there are none, add at the end."""
    lines = [line.lstrip(" ") for line in diff.rstrip().splitlines()]
    assert {line[0] for line in lines} <= set("+-"), diff
    old, new = ("".join(x[1:] + "\n" for x in lines if x[0] == sign) for sign in "-+")
    text = path.read_text(encoding="utf-8")
    assert not old or text.count(old) == 1, f"{path.name} has not once: {old}"
    path.write_text(text.replace(old, new) if old else text + new, encoding="utf-8")


@pytest.fixture
def run(toy, tmp_path, monkeypatch):
    """Runs a command of the page, but shorter, by a copy of the project in tmp_path. Returns the
    widths and the losses of its steps."""
    for path in (*ROOT.glob("*.py"), ROOT / "run", ROOT / "configs", *ROOT.glob("data/*.py")):
        to = tmp_path / path.relative_to(ROOT)
        to.parent.mkdir(exist_ok=True)
        shutil.copytree(path, to) if path.is_dir() else shutil.copy(path, to)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    ours = {path.stem for path in ROOT.glob("*.py")} | {"run", "data"}

    def take_out() -> dict:
        names = [name for name in sys.modules if name.partition(".")[0] in ours]
        return {name: sys.modules.pop(name) for name in names}

    def run_copy(command: str, *knobs: str) -> tuple[list, list]:
        take_out()
        import train  # the copy, as it is now

        assert train.__file__ == str(tmp_path / "train.py")
        arguments = [*shlex.split(command)[2:], *SHORT, f"--data_dir={toy.parent / 'data'}"]
        assert train.main([*arguments, *knobs]) == 0
        (out,) = re.findall(r"--out_dir=(\S+)", command)
        steps = events(tmp_path / out, "step")
        return [[e[kind] for kind in KINDS] for e in steps], [e["loss"] for e in steps]

    others = take_out()
    yield run_copy
    take_out()
    sys.modules.update(others)


def test_every_change_of_the_course_applies_runs_and_changes_the_run(run, tmp_path):
    assert len(DIFFS) == 7 and len(RUNS) == 4
    base, exercise, enlarged, taught = RUNS
    widths, losses = run(base)
    assert widths[0][0] > widths[-1][0]
    for file, diff in DIFFS:
        kept = (tmp_path / file).read_bytes()
        apply(diff, tmp_path / file)
        knobs = ["--criterion=gradient_size"] if "gradient_size" in diff else []
        assert run(exercise, *knobs) != (widths, losses), f"changes nothing: {diff}"
        (tmp_path / file).write_bytes(kept)
    assert run(exercise) == (widths, losses), "the copy is as it was"
    large = run(enlarged)[0]
    assert large[0] == large[-1] == widths[0], "never pruned"
    assert run(taught) != (widths, losses)
