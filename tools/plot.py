"""Draw runs from their logs: python -m tools.plot OUT_DIR [OUT_DIR ...] [--to FILE.png]

Loss, FFN width and learning rate over tokens, one colour a run; a run alone has its phases shaded.
The picture goes to the first OUT_DIR's run.png unless --to names another file (.png or .svg).
"""

import argparse
import sys
from pathlib import Path
from statistics import mean

from checkpoint import read_log


def by_name(out_dir: Path) -> dict[str, list[dict]]:
    """The events of a run, by name. Raises FileNotFoundError where nothing can be drawn yet."""
    events: dict[str, list[dict]] = {"step": [], "eval": []}
    for event in read_log(out_dir):
        events.setdefault(event["event"], []).append(event)
    if not (events["step"] and events["eval"]):
        raise FileNotFoundError(f"{out_dir}: no run that was validated yet; nothing to draw")
    return events


def draw(out_dirs: list[Path], to: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "0", "font.size": 9})  # the same bytes every time
    import matplotlib.pyplot as plt

    figure, (loss, size, rate) = plt.subplots(
        3, 1, sharex=True, figsize=(8, 6.4), height_ratios=(3, 1.3, 1.3), constrained_layout=True
    )
    logs = [by_name(out_dir) for out_dir in out_dirs]
    for i, (out_dir, events) in enumerate(zip(out_dirs, logs)):
        steps, evals, color = events["step"], events["eval"], f"C{i}"
        tokens = [e["tokens"] for e in steps]
        loss.plot(tokens, [e["loss"] for e in steps], color=color, alpha=0.35, lw=0.8)
        loss.plot(
            [e["tokens"] for e in evals],
            [e["val_loss"] for e in evals],
            "o-",
            color=color,
            ms=3,
            label=f"{out_dir.name}: {evals[-1]['val_loss']:.3f}",
        )
        widths = [mean(e["d_ff"]) if isinstance(e["d_ff"], list) else e["d_ff"] for e in steps]
        size.step(tokens, widths, where="pre", color=color)
        rate.plot(tokens, [e["lr"] for e in steps], color=color)
    if len(logs) == 1:
        shade_phases((loss, size, rate), logs[0]["step"])
    final = min(e["val_loss"] for events in logs for e in events["eval"])
    loss.set_ylim(final - 0.15, final + 1.6)
    loss.set_ylabel("loss, nats per token\n(line: training, dots: validation)")
    loss.legend(frameon=False, title="validation loss at the end", loc="upper right")
    size.set_ylabel("FFN width")
    size.set_ylim(bottom=0)
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    rate.set_xlabel("training tokens")
    for axes in (loss, size, rate):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, lw=0.5)
    figure.savefig(to, dpi=130, metadata={"Date": None} if to.suffix == ".svg" else None)


def shade_phases(axes, steps: list[dict]) -> None:
    start = 0
    for phase, color in (("enlarged", "#4c72b0"), ("prune", "#c44e52"), ("recover", "#55a868")):
        tokens = [e["tokens"] for e in steps if e["phase"] == phase]
        if tokens:
            for ax in axes:
                ax.axvspan(start, tokens[-1], color=color, alpha=0.08, lw=0)
            axes[0].text((start + tokens[-1]) / 2, 0.03, phase, ha="center", color=color,
                         transform=axes[0].get_xaxis_transform())  # fmt: skip
            start = tokens[-1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out_dirs", type=Path, nargs="+", metavar="OUT_DIR")
    parser.add_argument("--to", type=Path)
    args = parser.parse_args(argv)
    to = args.to or args.out_dirs[0] / "run.png"
    try:
        draw(args.out_dirs, to)
    except ModuleNotFoundError as error:
        print(f"error: {error}; pip install matplotlib", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
