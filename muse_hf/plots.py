"""Pictures of what was measured. Needs matplotlib, which nothing else in the package does."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from muse_hf.profiling import Profile

try:
    import matplotlib
except ImportError as error:
    raise ImportError(
        "pictures need matplotlib: pip install matplotlib, or the extra muse_hf[examples]"
    ) from error

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

_SMALLEST_ERROR = 1e-3  # percent: below this nothing is worth telling apart, and the colours end
_MOST_LABELLED = 16  # heads of which each cell still has room for its number


def plot_profile(profile: "Profile", path: str | Path) -> None:
    """Output error, layers x heads, as a heat map, and beside it the harm of each layer as bars."""
    if not profile.layers:
        raise ValueError("no layer uses MuSe, so that there is nothing to draw")
    layers = [entry.layer for entry in profile.layers]
    errors = 100 * np.array([entry.output_error for entry in profile.layers])
    harms = [100 * entry.harm for entry in profile.layers]
    num_layers, num_heads = errors.shape
    height = max(2.6, 1.4 + 0.34 * num_layers)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, height), layout="constrained", sharey=True, width_ratios=(3, 1.3)
    )
    image = left.imshow(errors.clip(_SMALLEST_ERROR), norm=LogNorm(), cmap="viridis", aspect="auto")
    left.set(xlabel="head", ylabel="layer", title="relative squared output error (%)")
    left.set_yticks(range(num_layers), layers)
    left.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=_MOST_LABELLED))
    if num_heads <= _MOST_LABELLED:
        _label_cells(left, image, errors)
    colorbar = figure.colorbar(
        image, ax=left, format=FuncFormatter(lambda value, _: f"{value:.2g}"), pad=0.02
    )
    colorbar.ax.yaxis.set_minor_formatter(NullFormatter())
    right.barh(range(num_layers), harms, color="#d1603d")
    right.axvline(0, color="black", linewidth=0.8)
    harm = "error of the model's output" if profile.exact_loss is None else "increase of the loss"
    right.set(xlabel=f"{harm} (%)", title="MuSe in this layer alone")
    right.xaxis.set_major_locator(MaxNLocator(nbins=4))
    right.grid(axis="x", alpha=0.25)
    right.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{profile.model}, {profile.length:,} tokens", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _label_cells(axes: plt.Axes, image: matplotlib.image.AxesImage, errors: np.ndarray) -> None:
    """Write each error into its cell, in a colour that can be read there."""
    for (row, column), error in np.ndenumerate(errors):
        color = "black" if image.norm(error) > 0.6 else "white"
        text = f"{error:.0f}" if error >= 10 else f"{error:.2g}" if error >= _SMALLEST_ERROR else "0"
        axes.text(column, row, text, color=color, ha="center", va="center", fontsize=7)
