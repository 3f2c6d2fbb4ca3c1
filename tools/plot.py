"""Draw runs from their logs: python -m tools.plot OUT_DIR [OUT_DIR ...] [--to FILE.png]

Loss, widths and learning rate over training tokens, one colour a run; a run alone has its phases
shaded. --units draws one run's prunes instead: what each one cost, and the scores that its units
were chosen by. The picture goes to the first OUT_DIR, as run.png or units.png, unless --to names
another file (.png or .svg).
"""

import argparse
import math
import sys
from pathlib import Path

from run import UserError
from run.folder import read_log
from tools import command

PHASES = {"enlarged": "#4c72b0", "prune": "#c44e52", "recover": "#55a868"}


def by_name(out_dir: Path) -> dict[str, list[dict]]:
    """The events of a run, by name. Raises UserError."""
    events: dict[str, list[dict]] = {"step": [], "eval": [], "prune": []}
    for event in read_log(out_dir):
        events.setdefault(event["event"], []).append(event)
    if not (events["step"] and events["eval"]):
        raise UserError(f"{out_dir}: no run that was validated yet; nothing to draw")
    return events


def tokens(events: list[dict]) -> list[int]:
    return [e["tokens"] for e in events]


def widths(events: dict[str, list[dict]], kind: str) -> tuple[list[int], list[int]]:
    """The tokens from which on each width of this kind holds, and the width; the run's end last."""
    prunes = [e for e in events["prune"] if e["group"] == kind]
    first = prunes[0]["width_before"] if prunes else events["step"][0][kind]
    y = [first, *(e["width_after"] for e in prunes)]
    return [0, *tokens(prunes), events["step"][-1]["tokens"]], [*y, y[-1]]


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


def draw(out_dirs: list[Path]):
    """A figure with the curves of runs. Raises UserError."""
    logs = [by_name(out_dir) for out_dir in out_dirs]
    kinds = list(dict.fromkeys(e["group"] for events in logs for e in events["prune"]))
    heights = (3, *[1.2] * len(kinds), 1.2)
    size = (8, 1.1 * sum(heights))
    figure, axes = open_figure(len(heights), 1, figsize=size, height_ratios=heights)
    loss, *rest, lr = axes[:, 0]
    for i, (out_dir, events) in enumerate(zip(out_dirs, logs)):
        steps, evals, color = events["step"], events["eval"], f"C{i}"
        loss.plot(tokens(steps), [e["loss"] for e in steps], color=color, alpha=0.35, lw=0.8)
        label = f"{out_dir.name}: {evals[-1]['val_loss']:.3f}"
        values = [e["val_loss"] for e in evals]
        loss.plot(tokens(evals), values, "o-", color=color, ms=3, label=label)
        for x in tokens(events["prune"]):
            loss.axvline(x, color=color, alpha=0.6, lw=0.7, ls=":")
        for panel, kind in zip(rest, kinds):
            panel.plot(*widths(events, kind), drawstyle="steps-post", color=color)
            panel.set_ylabel(kind)
        lr.plot(tokens(steps), [e["lr"] for e in steps], color=color)
    if len(logs) == 1:
        shade_phases(axes[:, 0], logs[0]["step"])
    final = min(e["val_loss"] for events in logs for e in events["eval"])
    loss.set_ylim(final - 0.15, final + 1.6)
    loss.set_ylabel("loss, nats per token\n(dots: validation, dotted: prunes)")
    loss.legend(frameon=False, title="validation loss at the end", loc="upper right")
    lr.set_ylabel("learning rate")
    for panel in (*rest, lr):
        panel.set_ylim(bottom=0)
    return figure


def shade_phases(panels, steps: list[dict]) -> None:
    start = 0
    for phase, color in PHASES.items():
        x = tokens([e for e in steps if e["phase"] == phase])
        if x:
            for panel in panels:
                panel.axvspan(start, x[-1], color=color, alpha=0.08, lw=0)
            panels[0].text((start + x[-1]) / 2, 0.03, phase, ha="center", color=color,
                           transform=panels[0].get_xaxis_transform())  # fmt: skip
            start = x[-1]


def draw_units(out_dir: Path):
    """A figure of what each prune of a run cost, and of the scores that units were chosen by: the
    median of each layer, and between the quartiles a shade. Layers keep the numbers that they had
    at first. Raises UserError.
    """
    log = by_name(out_dir)
    n_layer = widths(log, "n_layer")[1][0]
    layers = list(range(n_layer))
    curves: dict[str, dict[int, list]] = {}  # kind -> layer -> a point for each prune
    for e in log["prune"]:
        curve = curves.setdefault(e["group"], {})
        each = layers if len(e["scores"]) == len(layers) else [0]  # or one group for all layers
        for layer, quantiles in zip(each, e["scores"]):
            curve.setdefault(layer, []).append([e["tokens"], *quantiles])
        if e["group"] == "n_layer":
            layers = [layer for i, layer in enumerate(layers) if i not in e["removed"][0]]
    if not curves:
        raise UserError(f"{out_dir}: its log has no prune; nothing to draw")
    figure, rows = open_figure(len(curves), 2, figsize=(11, 3.4 * len(curves)))
    from matplotlib import colormaps

    for kind, (cost, score) in zip(curves, rows):
        prunes = [e for e in log["prune"] if e["group"] == kind]
        rises = [e["loss_after"] - e["loss_before"] for e in prunes]
        cost.stem(tokens(prunes), rises, basefmt="k-")
        cost.set_title(f"{kind}: what each prune added to the loss, nats per token")
        for layer, points in curves[kind].items():
            x, _, low, middle, high, _ = zip(*points)
            color = colormaps["viridis"](layer / n_layer)
            score.plot(x, middle, "o-", ms=3, color=color, label=f"layer {layer}")
            score.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
        score.set_yscale("log")
        score.set_title(f"{kind}: scores at each prune, median and quartiles")
        if len(curves[kind]) > 1:
            score.legend(frameon=False, ncols=math.ceil(n_layer / 8))
    return figure


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out_dirs", type=Path, nargs="+", metavar="OUT_DIR")
    parser.add_argument("--to", type=Path)
    parser.add_argument("--units", action="store_true", help="the prunes of one run")
    args = parser.parse_args(argv)
    to = args.to or args.out_dirs[0] / ("units.png" if args.units else "run.png")
    if to.suffix not in (".png", ".svg") or (args.units and len(args.out_dirs) > 1):
        parser.error("--to must end in .png or .svg, and --units takes one OUT_DIR")
    figure = draw_units(args.out_dirs[0]) if args.units else draw(args.out_dirs)
    figure.savefig(to, dpi=130)
    print(to)


if __name__ == "__main__":
    sys.exit(main())
