"""The comparison: which arms compare, their runs, and their table."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from helpers import events, run, same_end

from data.command import UserError
from tools import compare, read_log
from tools.compare import COLUMNS, load_arms, read_csv, t_test, write

SMALL = {"d_ff": 8, "n_head": 1, "n_kv_head": 1, "d_model": 8, "n_layer": 2}
SMALL |= {"head_dim": 4, "d_ff_target": 0, "n_kv_head_target": 0}
SMALL |= {"d_model_target": 0, "n_layer_target": 0}
# Two heads of half the size have as many weights, but are another shape
TWO_HEADS = SMALL | {"n_head": 2, "n_kv_head": 2, "head_dim": 2}
TABLE = f"setting,{','.join(COLUMNS)}\n"
for row in ("idea,1,3.5", "idea,2,3.25", "naive,1,3.75"):
    TABLE += f",{row},7.0,7,7,7,7.0,7.0\n"


@pytest.fixture(scope="module")
def idea(toy) -> str:
    return str(shutil.copy(toy, toy.with_name("idea.py")))


def table(idea: str, arms: dict) -> str:
    path = Path(idea).with_name("arms.py")
    path.write_text(f"base = {idea!r}\narms = {arms}\n")
    return f"{path}:arms"


def call(folder: Path, *arguments: str) -> list[str]:
    folders = [f"--out={folder / 'results'}", f"--runs={folder / 'runs'}"]
    return [*arguments, *folders, "--seeds=1"]


def test_an_arm_is_its_base_with_changes_and_has_equal_tokens_or_flops(idea):
    arms = {"oneshot": {"prune_schedule": "oneshot"}, "other": {}}
    path = table(idea, arms) + ":oneshot"
    base, arm = load_arms([idea, path], ["--weight_decay=0.2"], "idea")
    assert (base.setting, arm.setting, base.config.weight_decay) == ("", "arms", 0.2)
    assert arm.config == replace(base.config, prune_schedule="oneshot")

    def load(steps: int) -> None:
        arms = {"other": SMALL | {"max_steps": steps}}
        load_arms([idea, table(idea, arms)], [], "idea")

    with pytest.raises(UserError) as error:
        load(500)
    steps = int(str(error.value).partition("max_steps=")[2].split()[0])
    load(steps)  # as many FLOPs
    load(30)  # as many tokens
    for other in (steps - 3, steps + 3):
        with pytest.raises(UserError, match=f"max_steps={steps} "):
            load(other)


BAD_ARMS = [("other", TWO_HEADS), ("other", {"d_fff": 3}), ("other", {"seed": 7})]
BAD_ARMS += [("other", {"eval_tokens": 100}), ("other", {"dtype": "bfloat16"})]
BAD_ARMS += [("idea", {}), ("../../esc", {}), (3, {}), ("a|b", {})]


@pytest.mark.parametrize("name, changes", BAD_ARMS)
def test_an_arm_that_cannot_be_compared_is_refused(name, changes, idea):
    with pytest.raises(UserError, match="arm other: |arm idea: |arms.py:"):
        load_arms([idea, table(idea, {name: changes})], [], "idea")


def test_it_continues_after_a_stop_and_refuses_runs_that_differ(
    idea, tmp_path, refused
):
    first = tmp_path / "runs" / "idea" / "1"
    command = [*call(tmp_path, idea), "--dtype=auto"]
    assert run(idea, first, "--stop_after=12", "--dtype=auto") == 0
    assert compare.main(command) == 0
    assert [e["resumed"] for e in events(first, "start")] == [False, True]
    assert run(idea, tmp_path / "straight", "--dtype=auto") == 0
    assert same_end(first, tmp_path / "straight")
    # All seeds that are there count, and none that is done runs again
    second = shutil.copytree(first, first.with_name("2"))
    assert compare.main([*command, "--seeds=2-2"]) == 0
    done = read_log(first)[-1]
    rows = read_csv(tmp_path / "results" / "runs.csv")[""]["idea"]
    assert rows[2] == rows[1] | {"seed": 2}
    assert all(rows[1][key] == done[key] for key in ("val_loss", "tokens", "flops"))
    # What would lose a result is refused before the first run
    refused("its idea, seed 1", *command, f"--runs={tmp_path / 'x'}", main=compare.main)
    assert not (tmp_path / "x").exists()
    for name, old, new in (
        ("log.jsonl", '"data": "', '"data": "other'),
        ("log.jsonl", '"changes": []', '"changes": ["seed 1 -> 2"]'),
        ("config.json", '"dtype": "', '"dtype": "not '),
        ("config.json", '"weight_decay": 0.1', '"weight_decay": 0.2'),
    ):
        text = (second / name).read_text()
        assert old in text
        (second / name).write_text(text.replace(old, new))
        refused(f"{second}: ", *command, main=compare.main)
        (second / name).write_text(text)


def test_a_run_that_fails_stops_no_other_and_other_tables_stay(
    idea, tmp_path, capsys, monkeypatch
):
    def start(arm, seed, out_dir):  # in this process, to be quick
        knobs = [*arm.knobs, f"--seed={seed}", "--resume"]
        code = run(arm.path, out_dir, *knobs)
        return Mock(poll=lambda: code)

    monkeypatch.setattr(compare, "start", start)
    other = tmp_path / "runs" / "other" / "1"
    other.mkdir(parents=True)
    (other / "checkpoint.pt").write_text("of another program")
    path = tmp_path / "results" / "runs.csv"
    path.parent.mkdir()
    path.write_text(TABLE)
    before = read_csv(path)
    arms = table(idea, {"other": {"learning_rate": 2e-3}})
    assert compare.main(call(tmp_path, arms, idea, "--jobs=2", "--shorter=2")) == 1
    printed = capsys.readouterr().out.replace("\\", "/")
    assert "other/1 has ended, exit code 2" in printed
    tables = read_csv(path)
    assert tables[""] == before[""]
    assert tables["arms"].keys() == {"idea"}
    assert tables["arms"]["idea"][1]["tokens"] == 15 * 128


def test_a_stop_lets_all_runs_save(idea, tmp_path, monkeypatch):
    process = Mock(spec=subprocess.Popen)
    process.poll.side_effect = KeyboardInterrupt
    monkeypatch.setattr(compare, "start", lambda *run: process)
    assert compare.main(call(tmp_path, idea)) == 130
    process.wait.assert_called_once()
    assert process.terminate.called == (compare.os.name == "posix")


def test_a_table_is_written_as_it_was_read_and_bad_ones_stay(tmp_path, capsys, refused):
    path = tmp_path / "runs.csv"
    path.write_text(TABLE)
    again = tmp_path / "new" / "runs.csv"
    write(again, read_csv(path))
    assert again.read_text() == TABLE
    assert compare.main([f"--out={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert "\n| naive | 1 | 3.7500 | 7.0000 | +0.2500 (nan) | " in text
    assert "Arms have different seeds" in text
    for bad in ("a,b\n1,2\n", TABLE.replace("3.5", "much"), TABLE + ",idea,3\n"):
        path.write_text(bad)
        refused("runs.csv: line ", f"--out={tmp_path}", main=compare.main)
        assert path.read_text() == bad


def test_p_values_match_the_table_of_student():
    critical = 2.776445105  # 5%, 4 degrees of freedom
    differences = [x + critical * 0.5**0.5 for x in (-2.0, -1.0, 0.0, 1.0, 2.0)]
    assert t_test(differences) == pytest.approx(0.05, rel=1e-8)
