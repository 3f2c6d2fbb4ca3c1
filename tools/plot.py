"""Draw runs from their logs: python -m tools.plot OUT_DIR [OUT_DIR ...] [--to FILE.png]

Loss, widths, parameters and learning rate over tokens (or --over flops), one colour a run; a run
alone has its phases shaded. --units draws one run's prunes instead: when each neuron or KV group
of each layer went, and the scores that they were chosen by. The picture goes to the first OUT_DIR,
as run.png or units.png, unless --to names another file (.png or .svg).
"""

import argparse
import sys
from pathlib import Path
from statistics import mean

from run.checkpoint import read_log

AXES = {"tokens": "training tokens", "flops": "training FLOPs"}
KINDS = {"d_ff": "FFN neurons", "n_kv_head": "KV groups"}


class NothingToDraw(Exception):
    """One line for a person: which run, and what its log has not."""


def by_name(out_dir: Path) -> dict[str, list[dict]]:
    """The events of a run, by name. Raises NothingToDraw."""
    events: dict[str, list[dict]] = {"step": [], "eval": [], "prune": []}
    for event in read_log(out_dir):
        events.setdefault(event["event"], []).append(event)
    if not (events["step"] and events["eval"]):
        raise NothingToDraw(f"{out_dir}: no run that was validated yet; nothing to draw")
    return events


def width(value: int | list[int]) -> float:
    """The log has one number where all layers are equally wide, or one for each."""
    return mean(value) if isinstance(value, list) else value


def open_pyplot():
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "0", "font.size": 9})  # the same bytes every time
    import matplotlib.pyplot as plt

    return plt


def save(figure, to: Path) -> None:
    figure.savefig(to, dpi=130, metadata={"Date": None} if to.suffix == ".svg" else None)


def draw(out_dirs: list[Path], to: Path, over: str = "tokens") -> None:
    """The curves of runs over `tokens` or `flops`. Raises NothingToDraw."""
    logs = [by_name(out_dir) for out_dir in out_dirs]
    plt = open_pyplot()
    rows = {"d_ff": "FFN width", "n_kv_head": "KV groups", "params": "parameters"}
    if all(len({width(e["n_kv_head"]) for e in events["step"]}) == 1 for events in logs):
        del rows["n_kv_head"]
    rows["lr"] = "learning rate"
    figure, (loss, *rest) = plt.subplots(
        1 + len(rows),
        1,
        sharex=True,
        figsize=(8, 3 + 1.25 * len(rows)),
        height_ratios=(3, *[1.3] * len(rows)),
        constrained_layout=True,
    )
    for i, (out_dir, events) in enumerate(zip(out_dirs, logs)):
        steps, evals, color = events["step"], events["eval"], f"C{i}"
        x = [e[over] for e in steps]
        loss.plot(x, [e["loss"] for e in steps], color=color, alpha=0.35, lw=0.8)
        label = f"{out_dir.name}: {evals[-1]['val_loss']:.3f}"
        dots = [e[over] for e in evals], [e["val_loss"] for e in evals]
        loss.plot(*dots, "o-", color=color, ms=3, label=label)
        for axes, key in zip(rest, rows):
            style = "default" if key == "lr" else "steps-pre"
            axes.plot(x, [width(e[key]) for e in steps], drawstyle=style, color=color)
    if len(logs) == 1:
        shade_phases((loss, *rest), logs[0]["step"], over)
    final = min(e["val_loss"] for events in logs for e in events["eval"])
    loss.set_ylim(final - 0.15, final + 1.6)
    loss.set_ylabel("loss, nats per token\n(line: training, dots: validation)")
    loss.legend(frameon=False, title="validation loss at the end", loc="upper right")
    for axes, name in zip(rest, rows.values()):
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
    rest[-1].set_xlabel(AXES[over])
    for axes in (loss, *rest):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, lw=0.5)
    save(figure, to)


def shade_phases(axes, steps: list[dict], over: str) -> None:
    start = 0
    for phase, color in (("enlarged", "#4c72b0"), ("prune", "#c44e52"), ("recover", "#55a868")):
        x = [e[over] for e in steps if e["phase"] == phase]
        if x:
            for ax in axes:
                ax.axvspan(start, x[-1], color=color, alpha=0.08, lw=0)
            axes[0].text((start + x[-1]) / 2, 0.03, phase, ha="center", color=color,
                         transform=axes[0].get_xaxis_transform())  # fmt: skip
            start = x[-1]


def lifetimes(prunes: list[dict], over: str = "tokens") -> list[list[float]]:
    """For each layer and each unit that it had at first: at how many tokens or FLOPs the unit was
    removed; infinity for those that remain. prunes: the events of one kind of unit, in order.
    """
    before = prunes[0]["width_before"]
    n_layer = len(prunes[0]["removed"])
    widths = before if isinstance(before, list) else [before] * n_layer
    ends = [[float("inf")] * n for n in widths]
    alive = [list(range(n)) for n in widths]
    for event in prunes:
        for layer, removed in enumerate(event["removed"]):
            gone = {alive[layer][i] for i in removed}
            for unit in gone:
                ends[layer][unit] = event[over]
            alive[layer] = [unit for unit in alive[layer] if unit not in gone]
    return ends


def draw_units(out_dir: Path, to: Path, over: str = "tokens") -> None:
    """Which units of a run survived and when the others went, and their scores at each prune: the
    median, and between the quartiles a shade. Raises NothingToDraw.
    """
    prunes = [e for e in by_name(out_dir)["prune"] if "removed" in e]
    kinds = [kind for kind in KINDS if any(e["group"] == kind for e in prunes)]
    if not kinds:
        raise NothingToDraw(f"{out_dir}: its log has no prune, or is older than --units")
    plt = open_pyplot()
    figure, rows = plt.subplots(
        len(kinds), 2, squeeze=False, figsize=(11, 3.4 * len(kinds)), constrained_layout=True
    )
    for kind, (map_axes, score_axes) in zip(kinds, rows):
        events = [e for e in prunes if e["group"] == kind]
        ends = lifetimes(events, over)
        last = events[-1][over]
        shown = [[min(end, 2 * last) for end in row] for row in ends]  # imshow hides infinity
        widest = max(map(len, ends))  # layers of a model that was pruned before may differ
        padded = [row + [float("nan")] * (widest - len(row)) for row in shown]
        colors = plt.get_cmap("YlOrRd").with_extremes(over="black", bad="white")
        image = map_axes.imshow(
            padded,
            aspect="auto",
            interpolation="nearest",
            cmap=colors,
            vmin=events[0][over],
            vmax=last,
        )
        figure.colorbar(image, ax=map_axes, label=f"removed at, {AXES[over]}", extend="max")
        map_axes.set_title(f"{KINDS[kind]} (black: survived)")
        map_axes.set_xlabel("unit")
        map_axes.set_ylabel("layer")
        map_axes.locator_params(integer=True)
        x = [e[over] for e in events]
        for layer in range(len(ends)):
            _, low, middle, high, _ = zip(*(e["scores"][layer] for e in events))
            score_axes.plot(x, middle, "o-", ms=3, color=f"C{layer}", label=f"layer {layer}")
            score_axes.fill_between(x, low, high, color=f"C{layer}", alpha=0.15, lw=0)
        score_axes.set_yscale("log")
        score_axes.set_title("scores just before each prune: median and quartiles")
        score_axes.set_xlabel(AXES[over])
        score_axes.legend(frameon=False)
    save(figure, to)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out_dirs", type=Path, nargs="+", metavar="OUT_DIR")
    parser.add_argument("--to", type=Path)
    parser.add_argument("--over", choices=AXES, default="tokens")
    parser.add_argument("--units", action="store_true", help="which units of one run survived")
    args = parser.parse_args(argv)
    to = args.to or args.out_dirs[0] / ("units.png" if args.units else "run.png")
    if to.suffix not in (".png", ".svg") or (args.units and len(args.out_dirs) > 1):
        parser.error("--to must end in .png or .svg, and --units takes one OUT_DIR")
    try:
        if args.units:
            draw_units(args.out_dirs[0], to, args.over)
        else:
            draw(args.out_dirs, to, args.over)
    except ModuleNotFoundError as error:
        print(f"error: {error}; pip install matplotlib", file=sys.stderr)
        return 2
    except (NothingToDraw, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
