"""Whatever a config says: it is planned and runs, or it is refused in one line before anything."""

import itertools
import json
import math
import random
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest
from test_run import TOY

from checkpoint import load_checkpoint
from config import Config, ConfigError, check_memory
from data.prepare import prepare
from train import main

TOY = TOY | {"batch_size": 2, "context_length": 8, "eval_tokens": 8, "score_beta": 0.5}
WRONG_TYPE = {int: ["1.5", "'3'", "None", "True", "[3]", "3j", "10**5000", "max", "{1: 2}"]}
WRONG_TYPE[float] = ["'fast'", "None", "True", "[0.1]", "10**400", "abs", "object()"]
WRONG_TYPE[bool] = ["1", "'yes'", "None", "0.0"]
WRONG_TYPE[str] = ["3", "None", "b'x'", "['cpu']", "print"]
HARD = {int: ["-1", "0", "1", "2", "3", "7", "64", "-(10**12)", "10**12", "2**63 - 1", "2**63"]}
HARD[float] = ["-0.1", "0", "5e-324", "1e-9", "0.3", "0.9999999999", "1 - 1e-16", "1", "1e300"]
HARD[float] += ["float('nan')", "float('inf')", "-float('inf')", "-1e300", "2**63"]
HARD[bool] = ["True", "False"]
HARD[str] = ["''", "' '", "'none'", "'a\\nb'", "'\\0'", "'\\ud800'", "'x' * 300", "'x/' * 3000"]
COMMAND_LINE = ["--{}", "--{}=", "--{}=nan", "--{}=1e999", "--{}={{[]: 1}}", "--{}=((((", "{}=1"]
COMMAND_LINE += ["--{}=" + "9" * 5000, "--{}x=1", "--{}\n=1", "---{}=1"]
SEVERAL = [  # contradictions between fields, and what only together is too much
    "resume = overwrite = True", "n_head = 6", "n_kv_head = 3", "d_model = 12", "head_dim = 3",
    "head_dim = 99999999998", "d_model = 99999999999 * 4", "n_layer = 10**12",
    "d_model = d_ff = 4096; n_layer = 100_000", "batch_size = 9999999999; micro_batch_size = 1",
    "batch_size = micro_batch_size = 10**10", "n_head = n_kv_head = 2**40", "d_ff = 2**50",
    "batch_size = 6; micro_batch_size = 4", "d_ff_target = 64", "d_ff_target = 6", "round_to = 64",
    "d_ff = 33", "n_kv_head_target = 5", "n_kv_head_target = 3", "prune_start = prune_end",
    "prune_start, prune_end = 0.8, 0.4", "prune_start = 0.5; prune_end = 0.51", "prune_every = 13",
    "prune_every = 12", "max_steps = 3; warmup_steps = 0", "warmup_steps = 30", "stop_after = 30",
    "lr_restart = True; d_ff_target = n_kv_head_target = 0", "lr_restart = True; warmup_steps = 12",
    "learning_rate = 1; weight_decay = 1.5", "score_beta = 0.99", "context_length = 10**6",
    "data_dir = '~nobody/none'", "init_from = '~'", "match_flops = '.'", "device = 'mps'",
    "d_ff_target = n_kv_head_target = 0; match_flops = __file__",
    "d_ff_target = n_kv_head_target = 0; match_flops = 'none.py'",
    "d_ff_target = n_kv_head_target = 0; match_flops = 'configs/idea.py'; round_to = 5",
]  # fmt: skip
BAD_FILES = {  # what the line has to say
    "d_ff =": "SyntaxError", "\0": "null bytes", "\xff\xfe": "mine.py", "1 / 0": "ZeroDivisionError",
    "raise Exception('one\\ntwo')": "one two", "import sys; sys.exit(0)": "SystemExit",
    "exit('bye')": "bye", "raise KeyboardInterrupt": "KeyboardInterrupt", "(" * 500: "mine.py",
    "raise GeneratorExit": "GeneratorExit", "f = lambda: f(); f()": "RecursionError",
    "class E(BaseException): pass\nraise E('x')": "E: x", "import none": "ModuleNotFoundError",
    "from configs.none import *": "ModuleNotFoundError", "import os; os.stat('gone')": "gone",
    "D_FF = 3": "d_ff", "learningrate = 1.0": "learning_rate", "n_layers = 2": "n_layer",
    "for i in range(3): pass": "'i'", "é = 1": "'é'", "d_fff = 'x' * 10**6": "d_ff",
    "d_ff = [0] * 10**6": "d_ff", "class d_ff: pass": "d_ff", "print('hi'); seed = -1": "seed",
}  # fmt: skip


def cases():
    """(assignments for the config file, command line, what an error has to name)."""
    hints = get_type_hints(Config)
    for key, kind in hints.items():
        for value in WRONG_TYPE[kind] + HARD[kind]:
            if (key, value) not in {("compile", "'on'"), ("device", "'cuda'")}:
                yield f"{key} = {value}", [], key
        for form in COMMAND_LINE:
            if not (kind is str and form in ("--{}=", "--{}={{[]: 1}}")):
                yield "", [form.format(key)], key
    for text in SEVERAL:
        yield text, [], text.split(" ")[0].rstrip(",")
    for text, word in BAD_FILES.items():
        yield text, [], word
    yield "", ["--d_ff_targt=3"], "d_ff_target"
    yield "", ["--=1"], "''"
    yield "", ["--"], "''"
    yield "", [""], "''"


CASES = list(cases())
# One in a few of them, and always those that are not of one field: all of them take minutes.
SAMPLE = [case for i, case in enumerate(CASES) if i % 3 == 0 or i >= len(CASES) - 70]


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "data"
    text = folder.with_name("a.jsonl")
    text.write_text("".join(json.dumps({"text": f"{a} and {a}"}) + "\n" for a in range(500)))
    prepare([text], "shipped", folder)
    return folder


def attempt(toy: Path, tmp_path: Path, capsys, text: str, arguments: list[str], **knobs):
    """Run a config: its exit code, its errors, its out_dir."""
    out, config = tmp_path / "run", tmp_path / "mine.py"
    knobs = TOY | {"out_dir": str(out), "data_dir": str(toy)} | knobs
    lines = [f"{key} = {value!r}" for key, value in knobs.items()]
    config.write_bytes("\n".join([*lines, text]).encode("latin-1" if "\xff" in text else "utf-8"))
    code = main([str(config), *arguments])
    return code, capsys.readouterr().err, out


@pytest.mark.parametrize("text, arguments, word", CASES, ids=lambda x: repr(x)[:50])
def test_runs_or_is_refused(text, arguments, word, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    key = text.split(" ")[0]
    stop = 0 if key in ("max_steps", "stop_after") else 2
    code, error, out = attempt(toy, tmp_path, capsys, text, arguments, stop_after=stop)
    if code:
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        assert word in error and len(error) < 1000 + len(text), error
        assert {path.name for path in tmp_path.iterdir()} <= {"mine.py"}
    else:
        assert error == "" 
