"""The curve of a run as a picture, `curve.png`, drawn from its log."""

from pathlib import Path

from qwenvl_jax.training.history import of_kind, points, read_rows


def draw_curve(output: Path) -> None:
    """Draws `curve.png`: losses, and beside them answers right by kind or, for records, gradient norm and rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    rows = read_rows(output / "log.jsonl")
    trained, evaluated = of_kind(rows, "train"), of_kind(rows, "evaluation")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    lines = {"training": (trained, "loss", "-"), "auxiliary": (trained, "auxiliary_loss", "-")}
    for label, (source, name, style) in (lines | {"validation": (evaluated, "loss", "o-")}).items():
        if found := points(source, name):
            left.plot(*zip(*found, strict=True), style, label=label, markersize=4)
    left.set(title="Loss per token", yscale="log")
    kinds = [name for name in (evaluated[-1] if evaluated else {}) if name.startswith("right/")]
    right.set_prop_cycle(color=[pyplot.get_cmap("tab20")(i) for i in range(20)])
    for name in kinds:
        right.plot(*zip(*points(evaluated, name), strict=True), label=name.removeprefix("right/"))
    if kinds:
        right.set(title="Answers right on validation scenes", ylim=(0, 1.02))
    else:
        rate = right.twinx()
        for axis, name, colour in ((right, "gradient_norm", "tab:purple"), (rate, "learning_rate", "tab:gray")):
            if found := points(trained, name):
                label = name.replace("_", " ")
                axis.plot(*zip(*found, strict=True), color=colour, label=label)
                axis.set_ylabel(label, color=colour)
        right.set(title="Gradient norm and learning rate", yscale="log")
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.get_yscale() == "log":  # numbers between two powers of ten, and those as people write them
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_minor_formatter(NullFormatter())
    for axis in [left] if not kinds else [left, right]:
        if axis.lines:
            axis.legend(ncols=2 if axis is right else 1, fontsize="small")
    step = trained[-1]["step"] if trained else 0
    figure.suptitle(f"{output.name}, step {step:,}")
    figure.savefig(output / "curve.png", dpi=110)
    pyplot.close(figure)
