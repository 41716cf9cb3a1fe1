"""A picture of one's own: how far below log p(x) the ELBO of each datum is."""

from pyro_vae.plots.axes import axes_or_new


def plot_elbos(evidence, ax=None):
    """The ELBO of each datum against its log p(x), both in nats, with two Monte Carlo errors; on the line they are equal."""
    ax = axes_or_new(ax)
    names = ("log_evidence", "elbo", "std_error", "elbo_std_error")
    x, y, x_error, y_error = (getattr(evidence, name).cpu() for name in names)
    ax.errorbar(x, y, xerr=2 * x_error, yerr=2 * y_error, fmt="o", color="black", markersize=3, linewidth=0.8)
    ax.axline((float(x.min()),) * 2, slope=1, color="0.5", linewidth=0.8)
    ax.set(xlabel="log p(x), nats", ylabel="ELBO, nats", title=f"{len(evidence)} data")
    return ax
