"""Pictures of latents and of single data: what is drawn is what the record says, whatever its size."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.patches import StepPatch
from pair_helpers import F64, make_evidence, make_gaps

import pyro_vae as pv
from pyro_vae.errors import OptionError
from pyro_vae.latent import LatentSample
from pyro_vae.plots import (
    plot_aggregated_posterior,
    plot_gaps_per_datum,
    plot_latents,
    plot_manifold,
    plot_pareto_k,
    plot_traversals,
)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def latent_sample(num_data=300, num_units=3, labels=None, known=True):
    generator = torch.Generator().manual_seed(0)
    means, noise, prior = (torch.randn(num_data, num_units, generator=generator, dtype=F64) for _ in range(3))
    means = means * torch.linspace(1, 0, num_units, dtype=F64)  # the last one says nothing
    return LatentSample(
        draws=means + 0.3 * noise,
        means=means,
        prior=prior,
        names=("z",) if num_units == 1 else tuple(f"z[{unit}]" for unit in range(num_units)),
        analytic=torch.full((num_units,), known),
        labels=labels,
    )


def steps_of(ax):
    return [patch for patch in ax.patches if isinstance(patch, StepPatch)]


def points_of(ax):
    """The points of each scatter by its label, without those of the prior and those that matplotlib does not draw."""
    clouds = [c for c in ax.collections if isinstance(c, PathCollection) and c.get_label() != "prior"]
    offsets = {cloud.get_label(): np.asarray(cloud.get_offsets()) for cloud in clouds}
    return {label: points[np.isfinite(points).all(1)] for label, points in offsets.items()}


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# --- the aggregated posterior ---


def test_halves_are_histograms_of_draws_and_prior_on_the_same_bins():
    sample = latent_sample()
    ax = plot_aggregated_posterior(sample)
    pairs = list(zip(steps_of(ax)[::2], steps_of(ax)[1::2], strict=True))
    assert len(pairs) == 3
    for position, (left, right) in enumerate(pairs):
        unit = int(sample.order[position])
        edges = left.get_data().edges
        assert np.array_equal(edges, right.get_data().edges)
        sides = (position - left.get_data().values, right.get_data().values - position)
        for width, values in zip(sides, (sample.draws, sample.prior), strict=True):
            share = np.histogram(values[:, unit].numpy(), edges)[0] / sample.num_data
            ratio = share.max() / width.max()
            assert np.allclose(width * ratio, share) and (width >= 0).all()
        assert max(side.max() for side in sides) == pytest.approx(0.42)  # no violin reaches into the next
        assert sides[0].sum() == pytest.approx(sides[1].sum(), rel=0.02)  # of equal area, but for the tails
        assert left.get_fill() and not right.get_fill()


def test_the_spread_of_means_tells_a_unit_that_says_nothing():
    sample = latent_sample()
    ax = plot_aggregated_posterior(sample)
    (container,) = ax.containers
    dots, _, (bars,) = container
    summary = sample.summary()
    order = sample.order
    assert order.tolist() == [0, 1, 2]
    assert np.allclose(dots.get_ydata(), summary["mean_of_means"][order])
    lengths = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
    assert lengths == pytest.approx((2 * summary["std_of_means"][order]).tolist())
    assert lengths[-1] == 0 and lengths[0] > 1.5
    assert [text.get_text() for text in ax.get_xticklabels()] == ["z[0]", "z[1]", "z[2]"]
    assert legend_of(ax) == ["q(z)", "prior", "posterior means"]


def test_the_widest_units_are_shown():
    ax = plot_aggregated_posterior(latent_sample(num_units=12))
    assert len(steps_of(ax)) == 20 and "10 of 12 units" in ax.get_title()
    ax = plot_aggregated_posterior(latent_sample(num_units=12), num_units=12)
    assert len(steps_of(ax)) == 24 and ax.get_title().endswith("12 units")
    with pytest.raises(OptionError, match="at least 1, got 0"):
        plot_aggregated_posterior(latent_sample(), num_units=0)


@pytest.mark.parametrize(("num_data", "num_units"), [(1, 1), (1, 3), (2, 1), (10_000, 2)])
def test_samples_of_any_size_are_drawn(num_data, num_units):
    _, given = plt.subplots()
    sample = latent_sample(num_data, num_units, labels=torch.zeros(num_data))
    assert plot_aggregated_posterior(sample, ax=given) is given
    given.figure.canvas.draw()
    assert len(steps_of(given)) == 2 * num_units
    if num_units > 1:
        assert len(points_of(plot_latents(sample, ax=plt.subplots()[1]))["0"]) == num_data
    else:
        with pytest.raises(OptionError, match=r"no unit 1: pass a name \('z'\)"):
            plot_latents(sample)


def test_values_that_are_all_the_same_and_values_that_are_missing():
    sample = latent_sample()
    sample.draws[:, 0], sample.prior[:, 0] = 2.0, 2.0
    for side in (sample.draws, sample.means, sample.prior):
        side[:100, 1] = math.nan
        side[:, 2] = math.nan
    ax = plot_aggregated_posterior(sample)
    ax.figure.canvas.draw()
    assert len(steps_of(ax)) == 4  # the third has no place in any datum
    assert len(points_of(plot_latents(sample, units=(0, 1)))["data"]) == 200


def test_units_whose_means_are_not_known_have_no_bar():
    ax = plot_aggregated_posterior(latent_sample(known=False))
    ax.figure.canvas.draw()
    assert len(steps_of(ax)) == 6 and np.isnan(ax.containers[0][0].get_ydata()).all()
    assert "no mean is known" in plot_latents(latent_sample(known=False)).get_title()


# --- the scatter ---


def test_means_are_scattered_by_label():
    labels = torch.arange(300) % 3
    sample = latent_sample(labels=labels)
    ax = plot_latents(sample, units=("z[1]", 0))
    for label in range(3):
        assert np.array_equal(points_of(ax)[str(label)], sample.means[labels == label][:, [1, 0]].numpy())
    background = ax.collections[0]
    assert background.get_label() == "prior" and np.array_equal(background.get_offsets(), sample.prior[:, [1, 0]].numpy())
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("z[1]", "z[0]") and legend_of(ax) == ["prior", "0", "1", "2"]


@pytest.mark.parametrize("labels", [torch.arange(300) % 10, (torch.arange(300) % 12) / 4, torch.arange(300) % 2 == 0])
def test_labels_differ_in_shape_and_in_colour(labels):
    ax = plot_latents(latent_sample(labels=labels))
    clouds = [c for c in ax.collections if c.get_label() != "prior"]
    assert len(clouds) == len(labels.unique())
    shapes = {cloud.get_paths()[0].vertices.tobytes() for cloud in clouds}
    assert len(shapes) == len(clouds)
    colors = {tuple(cloud.get_facecolor()[0, :3]) for cloud in clouds}
    assert len(colors) == len(clouds)
    assert max(np.dot(color, (0.299, 0.587, 0.114)) for color in colors) < 0.7 < 0.85  # lighter is only the prior


def test_many_labels_share_a_scale():
    labels = torch.linspace(0, 1, 300)
    ax = plot_latents(latent_sample(labels=labels))
    (cloud,) = [c for c in ax.collections if c.get_label() != "prior"]
    assert np.array_equal(cloud.get_array(), labels.numpy())
    assert len(ax.figure.axes) == 2 and ax.figure.axes[1].get_ylabel() == "label"


def test_all_labels_the_same_none_and_nan():
    same = points_of(plot_latents(latent_sample(labels=torch.full((300,), 7))))
    assert list(same) == ["7"] and len(same["7"]) == 300
    assert list(points_of(plot_latents(latent_sample()))) == ["data"]
    some = torch.where(torch.arange(300) < 100, math.nan, 1.0)
    assert len(points_of(plot_latents(latent_sample(labels=some)))["1"]) == 200
    plot_latents(latent_sample(labels=torch.full((300,), math.nan))).figure.canvas.draw()


def test_units_of_a_scatter_are_two():
    for units in ((0,), (0, 1, 2), "zz"):
        with pytest.raises(OptionError, match="two names or indices"):
            plot_latents(latent_sample(), units=units)


# --- sheets of images ---


def walk_record(shape=(4,), num_units=2, num_steps=3, start="mean"):
    means = torch.arange(float(num_units * num_steps)).reshape(num_units, num_steps, *[1] * len(shape))
    return pv.Traversal(
        means=means.expand(num_units, num_steps, *shape),
        values=torch.linspace(-1, 1, num_steps).expand(num_units, -1),
        levels=torch.linspace(0.05, 0.95, num_steps),
        names=tuple(f"z[{unit}]" for unit in range(num_units)),
        datum=torch.full(shape, 100.0),
        start=start,
        site="x",
    )


@pytest.mark.parametrize("shape", [(4,), (2, 2), (1, 2, 2)])
def test_a_traversal_is_a_sheet_of_rows(shape):
    _, given = plt.subplots()
    ax = plot_traversals(walk_record(shape), ax=given)
    sheet = ax.images[0].get_array()
    assert ax is given and sheet.shape == (5, 11)
    assert [[float(sheet[row, column]) for column in (0, 3, 6, 9)] for row in (0, 3)] == [[100, 0, 1, 2], [100, 3, 4, 5]]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["z[0]\n-1 to 1", "z[1]\n-1 to 1"]
    assert ax.get_yticks().tolist() == [0.5, 3.5] and ax.get_xticks().tolist() == [0.5, 3.5, 6.5, 9.5]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["datum", "5%", "50%", "95%"]
    assert (
        "posterior mean" in ax.get_title() and "draw of the guide" in plot_traversals(walk_record(start="draw")).get_title()
    )


def grid_record(shape=(4,), num_steps=3):
    means = torch.arange(float(num_steps**2)).reshape(num_steps, num_steps, *[1] * len(shape))
    return pv.Manifold(
        means=means.expand(num_steps, num_steps, *shape),
        values=torch.stack([torch.linspace(-1, 1, num_steps), torch.linspace(10, 20, num_steps)]),
        levels=torch.linspace(0.05, 0.95, num_steps),
        names=("z[0]", "w"),
        start="mean",
        site="x",
    )


@pytest.mark.parametrize("shape", [(4,), (1, 2, 2)])
def test_a_manifold_goes_right_with_the_first_unit_and_up_with_the_second(shape):
    """`means[i, j]` is 3 i + j."""
    ax = plot_manifold(grid_record(shape))
    sheet = ax.images[0].get_array()
    found = [[float(sheet[row, column]) for column in (0, 3, 6)] for row in (6, 3, 0)]  # from the bottom
    assert found == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["-1", "0", "1"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["20", "15", "10"] and ax.get_yticks()[0] == 0.5
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("z[0]", "w")


def test_large_sheets_have_a_label_here_and_there():
    ax = plot_manifold(grid_record(num_steps=15))
    assert len(ax.get_xticks()) == len(ax.get_yticks()) == 8
    ax.figure.canvas.draw()


def test_what_is_no_image_is_refused_before_anything_is_drawn():
    with pytest.raises(ValueError, match=r"images must be .* got \(8, 3\)"):
        plot_traversals(walk_record((3,)))
    with pytest.raises(ValueError, match=r"images must be .* got \(9, 2, 2, 2\)"):
        plot_manifold(grid_record((2, 2, 2)))
    assert not plt.get_fignums()


# --- gaps per datum ---


def gap_values(num_data):
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(num_data, generator=generator, dtype=F64) * scale for scale in (5.0, 1.0))


@pytest.mark.parametrize("num_data", [1, 10, 200])
def test_gaps_are_stacked_in_order(num_data):
    amortization, approximation = gap_values(num_data)
    gaps = make_gaps(amortization, approximation, num_data=num_data)
    _, given = plt.subplots()
    ax = plot_gaps_per_datum(gaps, ax=given)
    assert ax is given
    order = gaps.inference.argsort()
    encoder, family, edge = (patch.get_data() for patch in steps_of(ax))
    assert np.allclose(encoder.values, gaps.amortization[order]) and encoder.baseline == 0
    assert np.allclose(family.baseline, encoder.values) and np.allclose(family.values, gaps.inference[order])
    assert np.array_equal(edge.values, family.values) and encoder.edges.tolist() == list(range(num_data + 1))
    lines = [line.get_ydata()[0] for line in ax.lines]
    assert lines == pytest.approx([float(gaps.amortization.mean()), float(gaps.inference.mean())])
    assert ax.get_ylabel() == "gap, nats" and f"{num_data} data" in ax.get_title() and "step" not in ax.get_xlabel()
    assert f"mean inference gap {float(gaps.inference.mean()):.2f}" in legend_of(ax)
    assert f"amortization (encoder), mean {float(gaps.amortization.mean()):.2f}" in legend_of(ax)
    assert f"approximation (family), mean {float(gaps.approximation.mean()):.2f}" in legend_of(ax)


def test_neighbours_are_taken_together_where_there_are_many():
    amortization, approximation = gap_values(10_000)
    gaps = make_gaps(amortization, approximation, num_data=10_000)
    ax = plot_gaps_per_datum(gaps)
    encoder, family, _ = (patch.get_data() for patch in steps_of(ax))
    assert len(encoder.values) == 200 and encoder.edges[-1] == 10_000 and (np.diff(encoder.edges) == 50).all()
    order = gaps.inference.argsort()
    assert np.allclose(family.values, gaps.inference[order].reshape(200, 50).mean(1))
    assert np.allclose(encoder.values, gaps.amortization[order].reshape(200, 50).mean(1))
    assert "each step: mean of 50 data" in ax.get_xlabel()


def test_gaps_that_are_not_finite_are_left_out_and_counted():
    amortization, approximation = gap_values(10)
    approximation[[2, 5]] = torch.tensor([math.nan, -math.inf], dtype=F64)
    gaps = make_gaps(amortization, approximation, num_data=10)
    ax = plot_gaps_per_datum(gaps)
    keep = approximation.isfinite()
    assert np.allclose(steps_of(ax)[1].get_data().values, gaps.inference[keep].sort().values)
    assert "10 data, 2 not finite left out" in ax.get_title()
    assert ax.lines[1].get_ydata()[0] == pytest.approx(float(gaps.inference[keep].mean()))
    with pytest.raises(ValueError, match="none of the 3 data has finite gaps"):
        plot_gaps_per_datum(make_gaps(1.0, math.nan, num_data=3))


# --- Pareto k ---


def k_axes(k, **fields):
    k = torch.as_tensor(k, dtype=F64)
    _, given = plt.subplots()
    assert plot_pareto_k(make_evidence(torch.zeros(len(k)), pareto_k=k, **fields), ax=given) is given
    given.figure.canvas.draw()
    return given


def lightness(bar):
    return np.dot(bar.get_facecolor()[:3], (0.299, 0.587, 0.114))


def test_pareto_k_and_its_thresholds():
    """The threshold of 1000 weights is 2/3, and an edge of the bars; those above are darker, and red."""
    k = [-0.2, 0.1, 0.1, 0.55, 0.6, 0.66, 0.67, 0.8, 1.2]
    ax = k_axes(k)
    bars = [(bar.get_x(), bar.get_width(), bar.get_height(), lightness(bar)) for bar in ax.patches]
    assert sum(height for _, _, height, _ in bars) == 9
    for x, width, height, shade in bars:
        assert height == sum(x <= value < x + width for value in k)
        assert (shade < 0.5) == (x > 2 / 3 - 1e-9) and (x + width < 2 / 3 + 1e-9 or x > 2 / 3 - 1e-9)
    assert sum(height for *_, height, shade in bars if shade < 0.5) == 3
    assert sorted(line.get_xdata()[0] for line in ax.lines) == pytest.approx([0.5, 2 / 3])
    assert legend_of(ax) == ["6 of 9 above 0.50", "3 of 9 above 0.67"]


def test_k_that_are_not_finite_are_told_in_words():
    ax = k_axes([0.1, 0.3, math.inf, math.inf, -math.inf, math.nan])
    assert sum(bar.get_height() for bar in ax.patches) == 2
    assert legend_of(ax) == [
        "2 of 6 above 0.50",
        "2 of 6 above 0.67",
        "no bar: 2 inf (a handful of weights is all)",
        "no bar: 1 -inf (all weights equal)",
        "no bar: 1 nan (not judged)",
    ]


@pytest.mark.parametrize(
    ("k", "num_particles"),
    [
        ([0.3], 1000),
        ([0.3] * 5, 1000),
        ([math.nan] * 3, 50),
        ([math.nan], 1),
        ([-math.inf] * 3, 1000),
        ([5.0, 90.0], 1000),
        ([0.7] * 3, 10_000),
    ],
)
def test_any_k_are_drawn(k, num_particles):
    ax = k_axes(k, num_particles=num_particles)
    finite = [value for value in k if math.isfinite(value)]
    assert sum(bar.get_height() for bar in ax.patches) == len(finite)
    assert f"Pareto k of {len(k)} data, K = {num_particles}" in ax.get_title()


def test_thresholds_that_agree_are_one_line():
    ax = k_axes([0.1, 0.6], num_particles=100)
    assert len(ax.lines) == 1 and legend_of(ax) == ["1 of 2 above 0.50"]
