"""The comparison: which arms compare, their runs, their table, and the records of the challenge."""

import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from helpers import ROOT, run, same_end

from run import UserError
from run.checkpoint import load_checkpoint
from run.cost import n_parameters
from run.out_dir import read_log
from tools import compare
from tools.compare import COLUMNS, Arms, load_arms, paired, read_csv, t_test, write

SCRATCH = dict(d_ff=8, n_head=1, n_kv_head=1, head_dim=4, d_model=8, n_layer=2)
SCRATCH |= dict(d_ff_target=0, n_kv_head_target=0, d_model_target=0, n_layer_target=0)
NAMES = ("idea", "scratch", "scratch_flops", "naive", "oneshot", "enlarged", "idea_attention")
TABLES = ("gpu", "axes", "axes_70k", "speeches_18", "speeches_16_250k", "speeches_142_250k")
SHIPPED = [[*(f"configs/{name}.py" for name in NAMES), "studies/arms.py:changes"]]
SHIPPED += [[f"studies/arms.py:{name}"] for name in TABLES]
PAGE = (ROOT / "docs/challenge.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def idea(toy) -> str:
    return str(shutil.copy(toy, toy.with_name("idea.py")))


def table(idea: str, **arms: dict) -> str:
    path = Path(idea).with_name("arms.py")
    path.write_text(f"base = {idea!r}\narms = {arms}\n")
    return f"{path}:arms"


def call(folder: Path, *arguments: str) -> list[str]:
    return [*arguments, f"--out={folder / 'results'}", f"--runs={folder / 'runs'}", "--seeds=1"]


@pytest.mark.parametrize("shorter", [1, 8])
@pytest.mark.parametrize("paths", SHIPPED, ids=lambda paths: paths[-1])
def test_shipped_arms_compare_and_scratch_flops_is_even_to_a_step(paths, shorter):
    knobs = ["--data_dir=data/sotu", f"--shorter={shorter}"]
    arms = {arm.name: arm.plan for arm in load_arms(paths, knobs, "idea")}
    theirs, ours = arms["idea"], arms["scratch_flops"]
    assert abs(ours.flops() - theirs.flops()) < ours.flops() / ours.schedule.max_steps
    lengths = {name: plan.schedule.max_steps for name, plan in arms.items()}
    assert {name for name in arms if lengths[name] != lengths["idea"]} == {"scratch_flops"}
    assert {name for name in arms if arms[name].final != theirs.final} == {"enlarged"} & arms.keys()


def test_an_arm_of_a_table_is_its_base_with_its_changes_and_knobs(idea):
    path = table(idea, oneshot={"prune_schedule": "oneshot"}, other={})
    base, one = load_arms([idea, f"{path}:oneshot"], ["--d_model=32"], "idea")
    assert (base.setting, one.setting, base.config.d_model) == ("", "arms", 32)
    assert one.config == replace(base.config, prune_schedule="oneshot")


def test_arms_that_do_not_compare_are_refused_with_a_max_steps(idea):
    def no(words: str, *arms: str, **changes) -> str:
        with pytest.raises(UserError, match=words) as error:
            load_arms([idea, *(arms or [table(idea, other=changes)])], [], "idea")
        return str(error.value)

    no("no such name, .*: 'a'", table(idea, other={}) + ":a")
    no("studies/arms.py:gpu:a: no such name", "studies/arms.py:gpu:a")
    no("a second arm", idea)
    no("arm other: .* nearest is 'd_ff'", d_fff=3)
    for knob in ("seed", "out_dir"):
        no(f"arm other: --{knob}=7: not for a comparison", **{knob: 7})
    path = Path(table(idea, other={}).removesuffix(":arms"))
    no("unknown key 'base'", str(path))
    for name in ("../../esc", "..", "", 3, "a|b"):
        path.write_text(f"base = {idea!r}\narms = {{{name!r}: {{}}}}")
        no("arms.py:arms: no such name", f"{path}:arms")
    # 16 x 4 weights in each of q, k, v, o, or 16 x 6 in q and o and 16 x 2 in k and v: as many
    no("not comparable with idea: ends as ", **SCRATCH | {"n_head": 3, "head_dim": 2})
    words = no("arm other: .*neither its tokens nor its FLOPs", **SCRATCH, max_steps=500)
    steps = int(words.partition("max_steps=")[2].split()[0])
    for other in (steps - 3, steps + 3):
        no(f"not comparable .*; max_steps={steps} ", **SCRATCH, max_steps=other)
    for same in (steps, 30):  # the FLOPs, the tokens
        load_arms([idea, table(idea, other=SCRATCH | {"max_steps": same})], [], "idea")


@pytest.mark.skipif(os.name != "posix", reason="elsewhere the console tells the runs")
def test_a_signal_saves_what_runs_and_starts_nothing_else(idea, tmp_path, monkeypatch):
    first, other = tmp_path / "runs" / "idea" / "1", table(idea, other={"weight_decay": 0.2})

    def sleep(seconds: float, pause=compare.time.sleep) -> None:
        pause(seconds)
        if (first / "log.jsonl").exists():
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(compare.time, "sleep", sleep)
    assert compare.main(call(tmp_path, idea, other, "--max_steps=9000")) == 130
    assert 0 < load_checkpoint(first / "checkpoint.pt")["step"] < 9000
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["idea"]


def test_interrupted_it_goes_on_and_what_is_done_is_not_run_again(idea, tmp_path, capsys, refused):
    out, first = tmp_path / "results", tmp_path / "runs" / "idea" / "1"
    command = call(tmp_path, idea, "--dtype=auto")
    assert run(Path(idea), first, "--dtype=auto", "--stop_after=12") == 0
    assert compare.main(command) == 0, capsys.readouterr().err
    assert run(Path(idea), tmp_path / "straight", "--dtype=auto") == 0
    assert same_end(first, tmp_path / "straight")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.*")}
    made = {path: path.read_bytes() for path in out.iterdir()}
    assert compare.main(command) == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.*")}
    assert made == {path: path.read_bytes() for path in out.iterdir()}
    done, row = read_log(first)[-1], read_csv(out / "runs.csv")[""]["idea"][1]
    assert all(row[key] == done[key] for key in ("val_loss", "params", "tokens", "flops"))
    # All seeds that are there count, and must compare
    second = shutil.copytree(first, first.with_name("2"))
    assert compare.main([*command, "--seeds=2-2"]) == 0
    assert read_csv(out / "runs.csv") == {"": {"idea": {1: row, 2: row | {"seed": 2}}}}
    for name, old, new, words in (
        ("log.jsonl", '"data": "', '"data": "other', "2: does not compare: .*other"),
        ("log.jsonl", '"val_loss": ', '"val_loss": NaN, "was": ', "2: its log says no result"),
        ("config.json", '"dtype": "', '"dtype": "not ', "2: does not compare: .*not "),
        ("config.json", '"weight_decay": 0.1', '"weight_decay": 0.2', "2: made .*=0.2"),
    ):
        text = (second / name).read_text()
        (second / name).write_text(text.replace(old, new))
        refused(words, *command, main=compare.main)
        (second / name).write_text(text)


def test_an_arm_that_fails_stops_no_other_and_its_own_error_is_shown(idea, tmp_path, capsys):
    (other := tmp_path / "runs" / "other" / "1").mkdir(parents=True)
    (other / "checkpoint.pt").write_text("of another program")
    arms = table(idea, other={"learning_rate": 2e-3})
    assert compare.main(call(tmp_path, arms, idea, "--jobs=2", "--shorter=2")) == 1
    words = "exit code 2: error: .* holds checkpoint.pt, but no config.json"
    assert re.search(words, capsys.readouterr().err)
    arms = read_csv(tmp_path / "results" / "runs.csv")["arms"]  # the name of the table
    assert arms.keys() == {"idea"} and arms["idea"][1]["tokens"] == 15 * 128


def test_results_that_the_call_has_not_got_are_never_lost(tmp_path, capsys):
    def arm(name: str, *losses: float) -> Arms:  # with 7 in all other columns
        seven = dict.fromkeys(COLUMNS, 7) | {"arm": name}
        return {name: {i: seven | {"seed": i, "val_loss": x} for i, x in enumerate(losses, 1)}}

    path = tmp_path / "new" / "runs.csv"
    write(path, "", few := arm("idea", 3.5, 3.25) | arm("oneshot", 4.0))
    path.write_text(path.read_text().replace("\n,", "\n").replace("setting,", ""))  # as old files
    write(path, "other", few)
    write(path, "", more := few | arm("naive", 3.75))
    fewer, other = arm("idea", 3.5, 3.25), more | arm("idea", 3.1, 3.25)
    for arms, lost in ((fewer, "oneshot, seed 1"), (other, "idea, seed 1")):
        with pytest.raises(UserError, match=lost):
            write(path, "", arms)
    assert read_csv(path) == {"": more, "other": few}
    assert compare.main([f"--out={path.parent}"]) == 0
    first, second = capsys.readouterr().out.split("other\n\n")
    assert [line.split(" | ")[:5] for line in first.splitlines()[2:5]] == [
        ["| idea", "2", "3.3750 ± 0.1768", "7.0000 ± 0.0000", ""],
        ["| naive", "1", "3.7500", "7.0000", "+0.2500 (nan)"],
        ["| oneshot", "1", "4.0000", "7.0000", "+0.5000 (nan)"],
    ]
    assert "naive" not in second


def test_what_is_no_result_is_refused_and_not_replaced(tmp_path, monkeypatch, refused):
    monkeypatch.setenv("HOME", str(tmp_path))  # which is ~
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    head, row = ",".join(COLUMNS) + "\n", "idea,1,3,1,7,7,7,7,0\n"
    (csv := tmp_path / "mine" / "runs.csv").parent.mkdir()
    for wrong in ("--seed=2", "--stop_after=9", "--out_dir=x"):
        refused(f"{wrong}: not", "configs/idea.py", "--out=x", wrong, main=compare.main)
    rows = [row.replace("3", "much"), row.replace("3", "nan"), row.replace("7", "0"), "idea,1\n"]
    rows += [row.replace(",0", ",0,5"), row.replace(",0", ",nan")]  # a decimal comma
    texts = ["", "\0", "\udcff", "val_loss," + head + "1," + row, head + row + row]
    for text in texts + [head + wrong for wrong in rows]:
        csv.write_bytes(content := text.encode(errors="surrogateescape"))
        refused("runs.csv: line ", "--out=~/mine", main=compare.main)
        with pytest.raises(UserError, match="line "):
            write(csv, "", {})
        assert csv.read_bytes() == content


def test_p_values_match_the_table_of_student():
    differences = [x + 2.776445105 * 0.5**0.5 for x in (-2.0, -1.0, 0.0, 1.0, 2.0)]  # 5%, 4 df
    assert t_test(differences) == pytest.approx(0.05, rel=1e-8)


def test_the_challenge_names_the_cost_of_the_small_models_and_its_entry_compares(tmp_path):
    rows = re.findall(r"`(\S+)` \| ([\d,]+) \| ([\d.e]+)", PAGE)
    for path, parameters, flops in rows:
        (arm,) = load_arms([path], ["--data_dir=data/sotu"], "scratch_flops")
        assert f"{n_parameters(arm.plan.final):,}" == parameters
        assert f"{arm.plan.flops():.4g}" == f"{float(flops):.4g}"
    (tmp_path / "arms.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.S)[1])
    load_arms(
        [rows[0][0], f"{tmp_path / 'arms.py'}:arms"], ["--data_dir=data/sotu"], "scratch_flops"
    )
    assert len(rows) == 2


def test_the_records_are_those_of_their_runs():
    lines = [line for line in PAGE.splitlines() if line.startswith("| 20")]
    for line in lines:
        link = r"\[`(\w*) ?\b(\w+)`\]\(\.\./studies/(\S+)/runs\.csv\)"
        setting, name, study = re.search(link, line).groups()
        arms = read_csv(ROOT / "studies" / study / "runs.csv")[setting]
        loss = mean(row["val_loss"] for row in arms[name].values())
        behind = paired(arms[name], arms["scratch_flops"])
        assert f"| {loss:.4f} | {-mean(behind):+.4f} | {t_test(behind):.2g} |" in line, line
    assert len(lines) > 3
