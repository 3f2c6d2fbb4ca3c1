"""What every picture of runs needs: the events of a log, what they say, and a figure."""

import math
from pathlib import Path

from model import KINDS
from run import UserError
from run.folder import read_log

RED = "#e54c4c"
# Event -> its fields that pictures take for finite numbers
NUMBERS = {
    "step": ("tokens", "flops", "loss", "lr", "params", *KINDS),
    "eval": ("tokens", "flops", "val_loss"),
    "prune": ("tokens", "flops", "width_before", "width_after", "loss_before", "loss_after"),
}


def by_name(out_dir: Path, pruned: bool = False) -> dict[str, list[dict]]:
    """The events of a run, by name. Raises UserError."""
    events: dict[str, list[dict]] = {name: [] for name in NUMBERS}
    try:
        for e in read_log(out_dir):
            if e["event"] in events:
                events[e["event"]].append(e)
                if bad := [k for k in NUMBERS[e["event"]] if not math.isfinite(e[k])]:
                    raise ValueError(f"{bad[0]}={e[bad[0]]}")
        kinds = {e["kind"] for e in events["prune"]}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        what = f"an event of its log is damaged, or of an older version: {error}"
        raise UserError(f"{out_dir}: {what}") from error
    if not (events["step"] and events["eval"]):
        raise UserError(f"{out_dir}: no run that was validated yet; nothing to draw")
    if pruned and not kinds:
        raise UserError(f"{out_dir}: its log has no prune; nothing to draw")
    return events


def along(events: list[dict], key: str = "tokens") -> list:
    return [e[key] for e in events]


def widths(events: dict[str, list[dict]], kind: str, x: str = "tokens") -> tuple[list, list]:
    """The tokens (or FLOPs) from which on each width of this kind holds, and the width; the run's
    end last."""
    prunes = [e for e in events["prune"] if e["kind"] == kind]
    first = prunes[0]["width_before"] if prunes else events["step"][0][kind]
    y = [first, *along(prunes, "width_after")]
    return [0, *along(prunes, x), events["step"][-1][x]], [*y, y[-1]]


def draw_jumps(panel, events: dict[str, list[dict]], color: str, now: float = math.inf) -> None:
    """Draw how each prune raises the loss on the same batches (red), and how it falls until the
    next prune; behind them, the training loss. Of the run until `now`, in tokens.
    """
    steps, prunes = events["step"], events["prune"]
    first, last = prunes[0]["tokens"], prunes[-1]["tokens"]
    margin = (last - first or steps[-1]["tokens"]) / 10
    first, last = first - margin, last + margin
    trained = [(e["tokens"], e["loss"]) for e in steps if first <= e["tokens"] <= last]
    jumps = [(e["tokens"], e[key]) for e in prunes for key in ("loss_before", "loss_after")]
    several = len({x for x, _ in jumps}) > 1
    losses = sorted(y for _, y in (jumps if several else trained + jumps))
    panel.set(xlim=(first, last), ylim=(losses[0] - 0.02, losses[-1] + 0.02))
    trained, jumps = ([p for p in points if p[0] <= now] for points in (trained, jumps))
    panel.plot(*zip(*trained or [(0, 0)]), color=color, alpha=0.35, lw=1)
    (line,) = panel.plot(*zip(*jumps or [(0, 0)]), color=color)
    for rise in zip(jumps[::2], jumps[1::2]):
        panel.plot(*zip(*rise), color=RED, lw=1.8 * line.get_lw(), solid_capstyle="butt")


def open_figure(rows: int, columns: int, **settings):
    """A figure and its axes over tokens, (rows, columns). Raises UserError without matplotlib."""
    try:
        import matplotlib.pyplot as plt
        from matplotlib.ticker import EngFormatter
    except ModuleNotFoundError as error:
        raise UserError(f"no figure: {error}; pip install -r requirements-extra.txt") from error
    plt.switch_backend("Agg")
    plt.rcParams.update({"font.size": 9})
    settings = {"sharex": "col", "squeeze": False, "constrained_layout": True} | settings
    figure, axes = plt.subplots(rows, columns, **settings)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, lw=0.5)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1M, 2M
    for panel in axes[-1]:
        panel.set_xlabel("training tokens")
    return figure, axes


def prunes_by_layer(log: dict[str, list[dict]]):
    """Each prune with two lists: the layer of each group that it cut, [0] for one group of all
    layers; and the layers that went. Layers keep the numbers that they had at first."""
    layers = list(range(widths(log, "n_layer")[1][0]))
    in_layers: dict[str, bool] = {}  # kind -> whether each layer has a group of it
    for e in log["prune"]:
        in_layers.setdefault(e["kind"], len(e["removed"]) == len(layers))
        gone = [layers[i] for i in e["removed"][0]] if e["kind"] == "n_layer" else []
        yield e, layers if in_layers[e["kind"]] else [0], gone
        layers = [layer for layer in layers if layer not in gone]
