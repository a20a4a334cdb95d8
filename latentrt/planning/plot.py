"""A plan as a picture."""

from pathlib import Path

from latentrt.errors import UserError


def draw(path: Path, found: dict[str, dict[str, list[tuple[int, float]]]], count: int) -> None:
    """Throughput over context, a panel per GPU and a line per cache format. UserError where nothing fits or can be written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {name: lines for name, lines in found.items() if lines}
    if not found:
        raise UserError(f"--plot: the model fits none of these GPUs, {count} of each; give more with --gpus")
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.2 * rows), squeeze=False, layout="constrained")
    for axis, (name, lines) in zip(axes.flat, found.items(), strict=False):
        for label, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", ms=3, label=label)
        axis.set(title=f"{count} x {name}", xlabel="context, tokens", xscale="log", yscale="log")
        axis.grid(True, color="#e6eaee")
    for axis in axes.flat[len(found) :]:
        axis.remove()
    for row in axes:
        row[0].set_ylabel("tokens/s of the largest batch, at best")
    axes.flat[0].legend(fontsize=8, frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"--plot: {path} cannot be written ({error.strerror}); name a file in a folder that is there") from None
    finally:
        plt.close(figure)
