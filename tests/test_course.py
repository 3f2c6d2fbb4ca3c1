"""Every command and every change of docs/course.md, read from the page, applied and run."""

import importlib
import re
from unittest.mock import patch

from helpers import ROOT, events

import prune
import schedule
import train

PAGE = (ROOT / "docs/course.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"```diff\n *# ([\w/.]+)\n(.*?)```", PAGE, re.S)
RUNS = re.findall(r"^ *python train\.py (.*)$", PAGE, re.M)
# 20 steps of 4 x 16 tokens; the base prunes four times in steps 4 to 8
SHORT = " --shorter=200 --batch_size=4 --context_length=16 --eval_tokens=500 --device=cpu"


def changed(file: str, diff: str) -> str:
    """What a reader does: replace the lines with a minus; where there are none, add at the end."""
    text = (ROOT / file).read_text(encoding="utf-8")
    lines = [line.lstrip(" ") for line in diff.rstrip().splitlines()]
    old, new = ("".join(x[1:] + "\n" for x in lines if x[0] == sign) for sign in "-+")
    assert not old or text.count(old) == 1, f"{file} has not once: {old}"
    return text.replace(old, new) if old else text + new


def test_every_change_of_the_course_applies_runs_and_changes_the_run(toy, tmp_path, monkeypatch):
    def run(command: str) -> list[tuple[int, float]]:
        """The widths and the losses of the steps."""
        arguments = [x.replace("configs", f"{ROOT}/configs") for x in (command + SHORT).split()]
        with patch.dict("run.config.CHOICES", criterion=prune.CRITERIA):  # as a new process has it
            assert train.main([*arguments, f"--data_dir={toy.parent / 'data'}", "--overwrite"]) == 0
        out = re.search(r"--out_dir=(\S+)", command)[1]
        return [(e["d_ff"], e["loss"]) for e in events(tmp_path / out, "step")]

    enlarged, once, base, exercise, oneshot, naive, taught = RUNS
    monkeypatch.chdir(tmp_path)
    wide, unchanged = run(enlarged), run(base)
    assert {width for width, _ in wide} == {unchanged[0][0]} != {unchanged[-1][0]}
    for a, b in zip(run(once), run(once.replace("sensitivity", "random"))):
        assert (a == b) == (a[0] == wide[0][0])  # until the prune
    assert len(DIFFS) == 7
    for file, diff in DIFFS:
        text, command = changed(file, diff), exercise
        if file.startswith("configs"):
            (tmp_path / "changed.py").write_text(text, encoding="utf-8")
            command = command.replace(file, "changed.py")
        knobs = " --criterion=gradient_size" if "gradient_size" in diff else ""
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        with patch.dict(vars(module)), monkeypatch.context() as patched:  # until the end of this
            exec(text, vars(module))
            patched.setattr("run.cost.Schedule", schedule.Schedule)
            assert run(command + knobs) != unchanged, f"changes nothing: {diff}"
    assert run(exercise) == unchanged
    restarts, goes_on = run(naive), run(oneshot)
    assert [width for width, _ in restarts] == [width for width, _ in goes_on]  # one step
    assert restarts != goes_on and run(taught) != unchanged
