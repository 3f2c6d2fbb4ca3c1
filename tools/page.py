"""A run as a page to play with, from its log: python -m tools.page OUT_DIR [OTHER]

OUT_DIR/page.html has all that it needs inside, OTHER beside it. tools/page.html is the frame.
OUT_DIR/play.html is its model, to prune by hand (tools/play.py)."""

import json
import sys
from argparse import ArgumentParser
from pathlib import Path

from data.command import UserError, command
from model import KINDS, SLICES
from run.checkpoint import write_text
from run.config import Config, load_config
from run.log import read_log
from schedule import Schedule
from tools import expanded, filled, name_of, play

KNOBS = ("max_steps", "learning_rate", "min_lr_fraction", "warmup_steps", "lr_restart")
KNOBS += ("prune_schedule", "prune_start", "prune_end", "prune_every", "n_head", "head_dim", *KINDS)
# What the page needs of each event of the log
SHOWN = {"start": "resumed", "step": "loss params", "eval": "val_loss", "done": "val_loss"}
SHOWN["prune"] = "kind width_before width_after loss_before loss_after removed scores"


def short(x):
    """Numbers in five digits. Raises ValueError for what is neither that, a list nor a kind."""
    if isinstance(x, list):
        return [short(y) for y in x]
    return x if isinstance(x, int) or x in KINDS else float(f"{x:.5g}")


def read_run(out_dir: Path) -> dict:
    """What the page shows of a run. Raises UserError."""
    c, events = load_config(str(out_dir)), read_log(out_dir)
    log = {name: [e for e in events if e["event"] == name] for name in SHOWN}
    if not log["step"]:
        raise UserError(f"{out_dir}: its log has no step yet; nothing to show")
    log["step"] = log["step"][:: len(log["step"]) // -400][::-1]  # no screen can show more of them
    run = {"name": name_of(out_dir), "end": max(e["step"] for e in events)}
    try:
        run["config"] = {knob: getattr(c, knob) for knob in KNOBS} | {"widths": Schedule(c).widths}
        for name, keys in SHOWN.items():
            run[name] = [{key: short(e[key]) for key in ("step", *keys.split())} for e in log[name]]
        json.dumps(run, allow_nan=False)
        check_prunes(c, log["prune"], run["end"])
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{out_dir}: its log is damaged, or too old to show: {error!r}") from error
    matrices = {kind: [s for s in SLICES[kind] if "norm" not in s.name] for kind in SLICES}
    run["slices"] = {k: [(s.name.split(".")[1], s.dim) for s in matrices[k]] for k in matrices}
    return run


def check_prunes(c: Config, prunes: list[dict], end: int) -> None:
    """Raises LookupError, TypeError, ValueError where the prunes of a log are not of this config,
    or do not say for each group which units went."""
    if end > c.max_steps:
        raise ValueError(f"step {end}, past max_steps={c.max_steps}")
    widths = {kind: getattr(c, kind) for kind in KINDS}
    for e in prunes:
        groups = widths["n_layer"] if e["kind"] in ("d_ff", "n_kv_head") else 1
        fewer = widths[e["kind"]] - e["width_after"]
        if [fewer] * groups != [len(units) for units in e["removed"]] or fewer < 1:
            raise ValueError(f"step {e['step']}: a prune that config.json does not lead to")
        widths[e["kind"]] = e["width_after"]


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out_dir", type=expanded, metavar="OUT_DIR")
    parser.add_argument("other", type=expanded, nargs="?", metavar="OTHER")
    args = parser.parse_args(argv)
    runs = [read_run(out_dir) for out_dir in (args.out_dir, args.other) if out_dir]
    html = filled("page.html", "/*RUNS*/", runs)
    write_text(args.out_dir / "page.html", html)  # in place of a link, too
    print(args.out_dir / "page.html")
    try:
        write_text(args.out_dir / "play.html", play.page_of(args.out_dir, args.other))
        print(args.out_dir / "play.html")
    except UserError as error:
        print(f"no play.html: {error}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
