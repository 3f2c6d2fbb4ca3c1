"""Draw runs from their logs: python -m tools.plot OUT_DIR [OUT_DIR ...] [--to FILE]

Loss, widths and learning rate over tokens, one colour a run, go to the first OUT_DIR, as run.png,
units.png or run.gif, unless --to names another file. With --animate, a .png shows the end alone."""

import math
from argparse import ArgumentParser
from pathlib import Path

import numpy as np

from data import command
from run import UserError
from run.out_dir import compact, read_log
from tools import expanded

# Of the first run, of the second, ...: where curves lie on each other, the lower one shows in gaps
LINES = "-", "--", "-.", ":"
NAMES = {"d_ff": "neurons", "n_kv_head": "heads", "d_model": "channels", "n_layer": "layers"}
BLUE, RED = "#4c8cd9", "#e54c4c"
# The film
CAPTIONS = {"enlarged": "A large model trains", "prune": "Its weakest parts go"}
CAPTIONS["recover"] = "What is left recovers"
GONE, CHOSEN, USED, GAP = range(4)  # the states of a unit; a gap is between two groups
GREY = (0.5, 0.5, 0.5, 0.25)


def by_name(out_dir: Path, pruned: bool = False) -> dict[str, list[dict]]:
    """The events of a run, by name. pruned: it must have a prune. Raises UserError."""
    events = read_log(out_dir)
    log = {name: [e for e in events if e["event"] == name] for name in ("step", "eval", "prune")}
    for name in ("step", "eval", "prune")[: 2 + pruned]:
        if not log[name]:
            raise UserError(f"{out_dir}: its log has no {name} yet; nothing to draw")
    return log


def along(events: list[dict], key: str = "tokens") -> list:
    return [e[key] for e in events]


def rises(prunes: list[dict]) -> list[float]:
    """What each prune added to the loss, in nats per token."""
    return [e["loss_after"] - e["loss_before"] for e in prunes]


def widths(log: dict[str, list[dict]], kind: str, x: str = "tokens") -> tuple[list, list]:
    """x and y of a curve: where each width of a kind begins, in tokens or FLOPs, and the width. The
    last width comes twice, the second time at the end of the run."""
    prunes = [e for e in log["prune"] if e["kind"] == kind]
    first = prunes[0]["width_before"] if prunes else log["step"][0][kind]
    y = [first, *along(prunes, "width_after")]
    return [0, *along(prunes, x), log["step"][-1][x]], [*y, y[-1]]


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
    return figure, axes


def draw(out_dirs: list[Path], x: str = "tokens"):
    """A figure with the curves of runs over x, "tokens" or "flops". Raises UserError."""
    logs = [by_name(out_dir) for out_dir in out_dirs]
    kinds = list(dict.fromkeys(e["kind"] for log in logs for e in log["prune"]))
    heights = (3, *[1.2] * len(kinds), 1.2)
    size = 8, 1.1 * sum(heights)
    figure, axes = open_figure(len(heights), 1, figsize=size, height_ratios=heights)
    loss, *rest, lr = axes[:, 0]
    for i, (out_dir, log) in enumerate(zip(out_dirs, logs)):
        evals, steps, color = log["eval"], along(log["step"], x), f"C{i}"
        style = {"color": color, "ls": LINES[i % len(LINES)]}
        label = f"{out_dir.name} ends at {evals[-1]['val_loss']:.3f}"
        if log["prune"]:
            label += f", prunes cost {round(sum(rises(log['prune'])), 2) + 0.0:.2f}"  # no -0
        loss.plot(along(evals, x), along(evals, "val_loss"), marker="o", ms=3, label=label, **style)
        loss.plot(steps, along(log["step"], "loss"), color=color, alpha=0.35, lw=0.8)
        for prune in along(log["prune"], x):  # dots in turn, where two runs prune at one step
            loss.axvline(prune, color=color, lw=0.8, ls=(2 * i, (1, 2 * len(logs) - 1)))
        for panel, kind in zip(rest, kinds):
            panel.plot(*widths(log, kind, x), drawstyle="steps-post", **style)
        lr.plot(steps, along(log["step"], "lr"), **style)
    final = min(e["val_loss"] for log in logs for e in log["eval"])
    loss.set(ylim=(final - 0.15, final + 1.6), ylabel="loss, nats per token")
    loss.plot([], [], "o-", color="grey", ms=3, label="validation")
    loss.plot([], [], color="grey", alpha=0.35, lw=0.8, label="training")
    loss.plot([], [], ":", color="grey", label="prune" if kinds else None)
    loss.legend(frameon=False, loc="upper right")
    for panel, name in zip((*rest, lr), (*kinds, "learning rate")):
        panel.set(ylim=(0, None), ylabel=name)
    lr.set_xlabel("training FLOPs" if x == "flops" else "training tokens")
    return figure


def draw_units(out_dir: Path):
    """A figure: what the prunes of a kind cost, and the scores that chose. Raises UserError."""
    log = by_name(out_dir, pruned=True)
    n_layer = widths(log, "n_layer")[1][0]
    kinds = {kind: NAMES.get(kind, kind) for kind in along(log["prune"], "kind")}
    figure, axes = open_figure(len(kinds), 2, figsize=(11, 3.5 * len(kinds)), sharex=False)
    from matplotlib import colormaps

    for (kind, name), (cost, score) in zip(kinds.items(), axes):
        own = [(e, layers) for e, layers, _ in prunes_by_layer(log) if e["kind"] == kind]
        prunes, scores = [e for e, _ in own], [dict(zip(layers, e["scores"])) for e, layers in own]
        added, turn = rises(prunes), 90 * (len(prunes) > 12)
        bars = cost.bar(range(len(prunes)), added, 0.5, color=RED)
        cost.bar_label(bars, fmt="%.3f", padding=2, rotation=turn)
        cost.set(ymargin=0.1, ylabel="rise of the loss, nats per token")
        cost.set_title(f"The last prune of {name} cost {added[-1]:.2f} of {sum(added):.2f} nats")
        ends = {"first prune": 0, "last prune": len(prunes) - 1} if prunes[1:] else {"prune": 0}
        for (when, i), line in zip(ends.items(), ("-", "--")):
            gone = 100 * (1 - prunes[i]["width_after"] / prunes[i]["width_before"])
            for layer, y in scores[i].items():  # quantiles at 0, 5, ... 100%
                x = np.linspace(0, 100, len(y))
                color = colormaps["viridis"](layer / n_layer)
                words = when + f", layer {layer}" * (len(scores[i]) > 1)
                named = layer in (min(scores[i]), max(scores[i]))
                score.plot(x, y, line, color=color, label=words if named else None)
                go = np.append(x[x < gone], gone)
                score.plot(go, np.interp(go, x, y), color=RED, lw=3)
        score.plot([], [], color=RED, lw=3, label="these go")
        score.legend(frameon=False)
        score.set(yscale="log", ylabel="score", xlabel=f"% of the {name}, weakest first")
        score.set_title(f"The {name} with the lowest scores go")
        ticks = [f"{e['width_before']}\n→ {e['width_after']}" for e in prunes]
        cost.set_xticks(range(len(prunes)), ticks, rotation=turn, fontsize=8)
        cost.set(xlim=(-1, len(prunes)), xlabel=f"{kind} before and after each prune")
    return figure


def moments_of(log: dict[str, list[dict]]) -> list[tuple[int, dict[str, np.ndarray]]]:
    """Tokens, and kind -> the states of its units, (groups, width at first), for each image: of 60
    steps or so; at a prune, of what goes where it stands, and of the others closed up."""
    prunes, moments, units = list(prunes_by_layer(log)), [], {}
    n_layer, steps = widths(log, "n_layer")[1][0], along(log["step"])
    for e, layers, _ in prunes:
        shape = 1 if layers == [0] else n_layer, e["width_before"]
        units.setdefault(e["kind"], np.full(shape, USED))
    for now in sorted({*steps[-1 :: -math.ceil(len(steps) / 60)], *along(log["prune"])}):
        units = {kind: states.copy() for kind, states in units.items()}
        for e, layers, gone in [prune for prune in prunes if prune[0]["tokens"] == now]:
            for layer, removed in zip(layers, e["removed"]):
                units[e["kind"]][layer, removed] = CHOSEN
            for states in (u for u in units.values() if len(u) > 1):
                states[gone] = np.minimum(states[gone], CHOSEN)  # a layer goes with its units
        moments.append((now, units))
        if now in along(log["prune"]):
            units = {k: -np.sort(-np.where(u == CHOSEN, GONE, u)) for k, u in units.items()}
            moments += [moments[-1], (now, units)]
    return moments


def draw_moment(panels, log: dict, now: int, units: dict[str, np.ndarray]) -> None:
    """Draw a run after `now` tokens. panels: a title, each kind of unit, rate and loss."""
    from matplotlib.colors import to_rgba_array

    title, *kinds, rate, loss = panels
    for panel in panels:
        panel.clear()
        panel.axis("off")
    past = {name: [e for e in log[name] if e["tokens"] <= now] for name in log}
    x, prunes, n = along(log["step"]), along(past["prune"]), max(1, len(past["step"]))
    step = log["step"][n - 1]
    title.set_title(CAPTIONS["prune" if now in prunes else step["phase"]], size=24, weight="bold")
    title.set_title(f"{compact(now)} tokens", loc="right")
    kinds[0].set_title(f"{compact(step['params'])} parameters", loc="right")
    for panel, (kind, states) in zip(kinds, units.items()):
        groups, width = states.shape
        lines = math.gcd(width, 8) if width > 64 else 1  # of cells, for each group
        cells = states.reshape(groups, -1, lines).swapaxes(1, 2)  # (groups, lines, cells of a line)
        cells = np.pad(cells, ((0, 0), (0, 1), (0, 0)), constant_values=GAP)
        colors = to_rgba_array((GREY, RED, BLUE, "none"))[cells.reshape(-1, width // lines)[:-1]]
        panel.imshow(colors, aspect="auto", interpolation="nearest")
        used = states == USED
        where = NAMES.get(kind, kind) + f", {used.any(1).sum()} layers" * (groups > 1)
        panel.set_title(f"{where}: {used.sum(1).max()} of {width}")
    rate.plot(x, lr := along(log["step"], "lr"), color=GREY)
    rate.plot(x[:n], lr[:n], "o-", markevery=[-1], color=BLUE, clip_on=False)
    rate.vlines(prunes, 0, 1, color=RED, lw=1.5, zorder=0, transform=rate.get_xaxis_transform())
    rate.set(xlim=(0, x[-1]), ylim=(0, None), title="learning rate")
    # On the same batches around each prune; after the last one, on the whole split
    losses = [e[key] for e in log["prune"] for key in ("loss_before", "loss_after")]
    evals = [e for e in past["eval"] if e["tokens"] > log["prune"][-1]["tokens"]]
    y = losses[: 2 * len(prunes)] + along(evals, "val_loss")
    label = f"validation: {y[-1]:.2f}" if y else "validation"
    loss.plot(along(past["step"]), along(past["step"], "loss"), color=GREY, label="training")
    loss.plot([*np.repeat(prunes, 2), *along(evals)], y, color=BLUE, label=label)
    loss.set(xlim=(0, x[-1]), ylim=(min(losses + along(log["step"], "loss")), max(losses) + 0.35))
    added = round(sum(rises(past["prune"])), 2) + 0.0  # no -0
    loss.set_title(f"loss, nats; prunes change it by {added:+.2f}")
    loss.legend(frameon=False, loc="upper right", handlelength=1, fontsize=15)


def draw_film(out_dir: Path, moving: bool) -> list:
    """Images of a run as it goes on, on black; or only the last one, on white. Raises UserError."""
    log = by_name(out_dir, pruned=True)
    moments, images = moments_of(log), []
    heights = [0.01, *(min(4, 0.5 * len(u)) for u in moments[0][1].values()), 0.6, 2]
    ink, paper, dpi = ("white", "#0d1117", 100) if moving else ("black", "white", 200)
    size = {"figsize": (7.2, 1.2 + sum(heights)), "height_ratios": heights, "dpi": dpi}
    figure, axes = open_figure(len(heights), 1, sharex=False, facecolor=paper, **size)
    from matplotlib import rc_context
    from PIL import Image

    style = {"text.color": ink, "axes.titlesize": 18, "axes.titlelocation": "left"}
    style |= {"lines.linewidth": 2.5, "lines.markersize": 8}
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    for moment in moments[::-1] if moving else moments[-1:]:
        with rc_context(style):
            draw_moment(axes[:, 0], log, *moment)
        figure.canvas.draw()
        figure.set_layout_engine("none")  # all moments keep the places of the last one
        images.insert(0, Image.fromarray(np.array(figure.canvas.buffer_rgba())).convert("RGB"))
    if moving:  # one palette for all: a small file
        palette = images[-1].quantize(64, Image.Quantize.MAXCOVERAGE)
        images = [image.quantize(palette=palette, dither=0) for image in images]
    return images


@command
def main(argv: list[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("out_dirs", type=expanded, nargs="+", metavar="OUT_DIR")
    parser.add_argument("--to", type=expanded)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--flops", action="store_true", help="over training FLOPs, not tokens")
    what.add_argument("--units", action="store_true", help="what the prunes of one run cost")
    what.add_argument("--animate", action="store_true", help="the units of one run, as it goes on")
    args = parser.parse_args(argv)
    first, *others = args.out_dirs
    if others and (args.units or args.animate):
        raise UserError("--units and --animate take one OUT_DIR")
    name = "units.png" if args.units else "run.gif" if args.animate else "run.png"
    if missing := [out_dir for out_dir in args.out_dirs if not out_dir.is_dir()]:
        raise UserError(f"{missing[0]}: no such run")
    to = args.to or first
    to = to / name if to.is_dir() else to.with_suffix(to.suffix or Path(name).suffix)
    try:
        if args.animate:
            images = draw_film(first, moving=to.suffix == ".gif")
            times = [7000 // len(images)] * (len(images) - 1) + [2000]  # ms
            images[0].save(to, save_all=True, append_images=images[1:], duration=times, loop=0)
        else:
            x = "flops" if args.flops else "tokens"
            figure = draw_units(first) if args.units else draw(args.out_dirs, x)
            figure.savefig(to, dpi=130)
    except (LookupError, TypeError, ValueError) as error:
        what = "a log of an older version, or damaged, or a name that ends otherwise"
        raise UserError(f"{first}: cannot be drawn to {to} ({what}): {error!r}") from error
    print(to)


if __name__ == "__main__":
    raise SystemExit(main())
