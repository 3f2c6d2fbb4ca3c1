"""Draw runs from their logs: python -m tools.plot OUT_DIR [OUT_DIR ...] [--to FILE]

Loss, widths and learning rate over training tokens, one colour a run. --units draws one run's
prunes instead: what each one cost, and the scores that its units were chosen by. --animate shows
all units that the runs prune, and loss and learning rate, as training goes on. The picture goes to
the first OUT_DIR, as run.png, units.png or run.gif, unless --to names another file: .png or .svg;
with --animate .gif, or .png for the last moment alone.
"""

import argparse
import math
import sys
from itertools import groupby
from pathlib import Path

import numpy as np

from run import UserError
from run.files import write_whole
from run.folder import read_log
from run.report import compact
from tools import command

CAPTIONS = {"enlarged": "Train a large model", "prune": "Prune its weakest parts"}
CAPTIONS["recover"] = "Train the rest"
NAMES = {"d_ff": "neurons", "n_kv_head": "heads", "d_model": "channels", "n_layer": "layers"}
GONE, FADING, CHOSEN, USED = range(4)  # the states of a unit; their colours in the animation
GREY, FADED, RED, BLUE = (0.5, 0.5, 0.5, 0.25), (0.9, 0.3, 0.3, 0.5), "#e54c4c", "#4c8cd9"


def by_name(out_dir: Path, pruned: bool = False) -> dict[str, list[dict]]:
    """The events of a run, by name. Raises UserError."""
    events: dict[str, list[dict]] = {"step": [], "eval": [], "prune": []}
    for event in read_log(out_dir):
        events.setdefault(event["event"], []).append(event)
    if not (events["step"] and events["eval"]):
        raise UserError(f"{out_dir}: no run that was validated yet; nothing to draw")
    if pruned and not events["prune"]:
        raise UserError(f"{out_dir}: its log has no prune; nothing to draw")
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
    final = min(e["val_loss"] for events in logs for e in events["eval"])
    loss.set_ylim(final - 0.15, final + 1.6)
    loss.set_ylabel("loss, nats per token\n(dots: validation, dotted: prunes)")
    loss.legend(frameon=False, title="validation loss at the end", loc="upper right")
    lr.set_ylabel("learning rate")
    for panel in (*rest, lr):
        panel.set_ylim(bottom=0)
    return figure


def prunes_by_layer(log: dict[str, list[dict]]):
    """Each prune with two lists: the layer of each group that it cut, [0] for one group of all
    layers; and the layers that went. Layers keep the numbers that they had at first."""
    layers = list(range(widths(log, "n_layer")[1][0]))
    in_layers: dict[str, bool] = {}  # kind -> whether each layer has a group of it
    for e in log["prune"]:
        in_layers.setdefault(e["group"], len(e["removed"]) == len(layers))
        gone = [layers[i] for i in e["removed"][0]] if e["group"] == "n_layer" else []
        yield e, layers if in_layers[e["group"]] else [0], gone
        layers = [layer for layer in layers if layer not in gone]


def draw_units(out_dir: Path):
    """A figure of what each prune of a run cost, and of the scores that units were chosen by: the
    median of each layer, and between the quartiles a shade. Layers keep the numbers that they had
    at first. Raises UserError.
    """
    log = by_name(out_dir, pruned=True)
    n_layer = widths(log, "n_layer")[1][0]
    curves: dict[str, dict[int, list]] = {}  # kind -> layer -> a point for each prune
    for e, layers, _ in prunes_by_layer(log):
        curve = curves.setdefault(e["group"], {})
        for layer, quantiles in zip(layers, e["scores"]):
            curve.setdefault(layer, []).append([e["tokens"], *quantiles])
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


def unit_states(log: dict[str, list[dict]]) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    """(tokens, stage of a prune) -> kind -> the states of its units from then on, (groups, width at
    first). Units go where they stand; then the others close up."""
    n_layer, states = widths(log, "n_layer")[1][0], {}
    for e, layers, _ in prunes_by_layer(log):
        shape = 1 if layers == [0] else n_layer, e["width_before"]
        states.setdefault(e["group"], np.full(shape, USED))
    moments = {(0, 0): states}
    for now, prunes in groupby(prunes_by_layer(log), lambda prune: prune[0]["tokens"]):
        states = {kind: units.copy() for kind, units in states.items()}
        for e, layers, gone in prunes:
            for layer, removed in zip(layers, e["removed"]):
                states[e["group"]][layer, removed] = CHOSEN
            for units in (u for u in states.values() if len(u) > 1):
                units[gone] = np.minimum(units[gone], CHOSEN)  # a layer goes with its units
        for stage, state in enumerate((CHOSEN, CHOSEN, FADING, GONE)):
            moments[now, stage] = {k: np.where(u == CHOSEN, state, u) for k, u in states.items()}
        states = {kind: -np.sort(-units) for kind, units in moments[now, stage].items()}
        moments[now, stage + 1] = states
    return moments


def draw_moment(panels, name: str, log: dict, states: dict[str, np.ndarray], now: int) -> None:
    """Draw what a run is after `now` tokens. panels: a title, each kind of unit, loss and rate."""
    from matplotlib.colors import to_rgba_array

    title, *kinds, loss, rate = panels
    for panel in panels:
        panel.clear()
        panel.axis("off")
    for panel, (kind, units) in zip(kinds, states.items()):
        groups, width = units.shape
        rows = max(n for n in range(1, 9) if width % n == 0 and width >= 32 * (n - 1))
        cells = to_rgba_array((GREY, FADED, RED, BLUE))[units].reshape(groups, -1, rows, 4)
        cells = np.pad(cells.swapaxes(1, 2), ((0, 0), (0, 1), (0, 0), (0, 0)))  # a gap below each
        edges = {"edgecolors": panel.figure.get_facecolor(), "lw": 0.8}
        panel.pcolormesh(cells.reshape(-1, width // rows, 4)[::-1], **edges)
        where = NAMES.get(kind, kind) + " per layer" * (groups > 1)
        panel.set_title(f"{where}: {(units == USED).sum(1).max()} of {width}", loc="left")
    x, y, lr = (np.array([e[key] for e in log["step"]]) for key in ("tokens", "loss", "lr"))
    n, prunes = max(1, sum(x <= now)), [t for t in tokens(log["prune"]) if t <= now]
    phase = "prune" if now in prunes else log["step"][n - 1]["phase"]
    title.set_title(name + CAPTIONS[phase], loc="left", fontsize=24, weight="bold")
    after = min(n, len(x) - 1) if now in prunes else n - 1  # after a prune, the next line has it
    size = log["step"][after]["params"]
    kinds[0].set_title(f"{compact(size)} parameters", loc="right")
    loss.plot(x[:n], y[:n], color=BLUE)
    loss.plot(prunes, np.interp(prunes, x, y), "o", color=RED)
    loss.set_title("loss (red: prunes)", loc="left")
    for e in (e for e in log["eval"] if e["tokens"] <= now):
        loss.set_title(f"on new text: {e['val_loss']:.2f}", loc="right")
    rate.plot(x, lr, color=GREY)
    rate.plot(x[:n], lr[:n], "o-", markevery=[-1], color=BLUE, clip_on=False)
    rate.set_title("learning rate", loc="left")


def draw_film(out_dirs: list[Path], moving: bool) -> list:
    """Images of runs as they go on, a column each, on black; or only the last one, on white. Raises
    UserError."""
    logs = [by_name(out_dir, pruned=True) for out_dir in out_dirs]
    films = [unit_states(log) for log in logs]
    kinds = max(len(film[0, 0]) for film in films)
    heights = [0.01, *[max(1.2, 2.8 / kinds)] * kinds, 1.1, 0.7]
    ink, paper, dpi = ("white", "#0d1117", 100) if moving else ("black", "white", 200)
    size = {"figsize": (7.2 * len(logs), 1.2 + sum(heights)), "height_ratios": heights, "dpi": dpi}
    figure, axes = open_figure(len(heights), len(logs), sharex=False, facecolor=paper, **size)
    from matplotlib import rc_context
    from PIL import Image

    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    style = {"text.color": ink, "axes.titlesize": 18, "lines.linewidth": 2.5, "lines.markersize": 8}
    steps = max((tokens(log["step"]) for log in logs), key=max)
    low = min(e["loss"] for log in logs for e in log["step"])
    few = {(t, 9) for t in steps[-1 :: -math.ceil(len(steps) / 60)]}  # 9: after all stages
    moments, images = sorted(few.union(*films), reverse=True), []
    for now in moments[:: math.ceil(len(moments) / 120) if moving else len(moments)]:
        for panels, out_dir, log, film in zip(axes.T, out_dirs, logs, films):
            name = f"{out_dir.name}: " if len(logs) > 1 else ""
            with rc_context(style):
                draw_moment(panels, name, log, film[max(m for m in film if m <= now)], now[0])
            panels[-2].set(xlim=(0, steps[-1]), ylim=(low - 0.1, low + 1.6))
            panels[-1].set(xlim=(0, steps[-1]), ylim=(0, None))
        figure.canvas.draw()
        figure.set_layout_engine("none")  # all moments keep the places of the last one
        images.insert(0, Image.fromarray(np.array(figure.canvas.buffer_rgba())).convert("RGB"))
    if not moving:
        return images
    dots = np.vstack([np.array(image)[::3, ::3] for image in images])  # they have all colours
    palette = Image.fromarray(dots).quantize(32, Image.Quantize.MAXCOVERAGE)
    return [image.quantize(palette=palette, dither=0) for image in images]  # one: a small file


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out_dirs", type=Path, nargs="+", metavar="OUT_DIR")
    parser.add_argument("--to", type=Path)
    parser.add_argument("--units", action="store_true", help="the prunes of one run")
    parser.add_argument("--animate", action="store_true", help="all units, as training goes on")
    args = parser.parse_args(argv)
    name = "units.png" if args.units else "run.gif" if args.animate else "run.png"
    to = args.to or args.out_dirs[0] / name
    endings = (".gif", ".png") if args.animate else (".png", ".svg")
    if to.suffix not in endings:
        raise UserError(f"--to={to}: must end in {' or '.join(endings)}")
    if args.units and (args.animate or len(args.out_dirs) > 1):
        raise UserError("--units takes one OUT_DIR, and no --animate")
    if args.animate:
        first, *rest = draw_film(args.out_dirs, moving=to.suffix == ".gif")
        times = [1000, *[7000 // max(1, len(rest))] * (len(rest) - 1), 2000]  # ms
        film = {"save_all": True, "append_images": rest, "duration": times, "loop": 0}
        write_whole(to, lambda file: first.save(file, to.suffix[1:], **film if rest else {}))
    else:
        figure = draw_units(args.out_dirs[0]) if args.units else draw(args.out_dirs)
        write_whole(to, lambda file: figure.savefig(file, format=to.suffix[1:], dpi=130))
    print(to)


if __name__ == "__main__":
    sys.exit(main())
