"""How a config is read: a file or the folder of a run, then the command line.

A config file is a Python file of assignments, such as configs/idea.py; it may start with `from
configs.idea import *`.
"""

import ast
import contextlib
import difflib
import json
import os
import runpy
import types
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

from run import UserError
from run.config import PATHS, Config, check_config

TYPES = get_type_hints(Config) | {"shorter": int}  # shorter is no knob: it changes LENGTHS
# What --shorter=N divides by N.
LENGTHS = ("max_steps", "warmup_steps", "prune_every", "eval_every", "save_every", "log_every")


def set_key(values: dict, key: str, value: object, where: str) -> None:
    """Raises UserError where a config has no such key, or the value is of another type."""
    if key not in TYPES:
        near = difflib.get_close_matches(key.lower(), TYPES, n=1)
        way = f"the nearest is '{near[0]}' (all: --help)" if near else "--help lists all keys"
        own = "" if where == "command line" else "; a name of your own starts with _"
        raise UserError(f"{where}: unknown key {key!r} = {value!r}; {way}{own}")
    kind = TYPES[key]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{where}: {key}={value!r} is not of type {kind.__name__}; see --help")
    values[key] = value


def read_file(path: str) -> dict:
    """The names that a config file assigns, or the config.json of a run's folder. Names that start
    with an underscore, modules and functions are the file's own business.
    """
    if os.path.isdir(path):
        try:
            values = json.loads(Path(path, "config.json").read_bytes())
            values["max_steps"]  # a Hugging Face folder has a config.json, too
        except (OSError, ValueError, LookupError, TypeError) as error:
            what = "not a run's folder (no config.json of train.py); give that, or a config file"
            raise UserError(f"{path}: {what}") from error
        of_the_call = {"resume": False, "overwrite": False, "stop_after": 0}
        return values | of_the_call | {"out_dir": str(Path(path))}
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such config file; the shipped ones are in configs/")
    try:
        names = runpy.run_path(path)
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    own = {k for k, v in names.items() if callable(v) or isinstance(v, types.ModuleType)}
    return {k: v for k, v in names.items() if not k.startswith("_") and k not in own}


def load_config(path: str, overrides: list[str] = ()) -> Config:
    """Read a config file or a run's folder and apply `--key=value` overrides. `--shorter=N` makes
    the whole run N times shorter, also what the command line says of its steps. Raises UserError.
    """
    values = {"shorter": 1}
    for key, value in read_file(path).items():
        set_key(values, key, value, path)
    for argument in overrides:
        key, equals, value = argument.removeprefix("--").partition("=")
        kind = TYPES.get(key)
        if not argument.startswith("--") or not (equals or kind in (bool, None)):
            raise UserError(f"command line: {argument!r} is not of the form --key=value")
        if kind is bool:
            value = value.capitalize() if equals else "True"
        if kind is not str:
            with contextlib.suppress(Exception):  # then it is a text, and of the wrong type
                value = ast.literal_eval(value)
        set_key(values, key, value, "command line")
    shorter = values.pop("shorter")
    if shorter < 1:
        raise UserError(f"shorter={shorter}: must be 1, 2, 3, ...")
    values["out_dir"] = values.get("out_dir") or f"out/{Path(path).stem}"
    values |= {key: os.path.expanduser(values[key]) for key in PATHS if key in values}
    c = Config(**values)
    whole = {key: getattr(c, key) for key in LENGTHS}
    c = replace(c, **{key: max(min(1, n), n // shorter) for key, n in whole.items()})
    check_config(c, shape_known=not c.init_from)
    return c
