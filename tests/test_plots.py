"""Pictures carry the numbers of their records and draw where they are told."""

import matplotlib.pyplot as plt
import pytest
import torch

import pyro_vae as pv
from pyro_vae.plots import plot_gaps, plot_reconstructions, plot_samples


def gaps_record(num_data=5):
    zeros = torch.zeros(num_data)
    evidence = pv.Evidence(
        log_evidence=zeros - 10.0,
        std_error=zeros + 0.1,
        elbo=zeros - 14.0,
        elbo_std_error=zeros + 0.2,
        ess=zeros + 300,
        pareto_k=zeros,
        smoothed=zeros - 10.0,
        bound="lower",
        num_particles=500,
        cost=1000,
    )
    names = ("elbo", "optimal_elbo", "log_evidence", "amortization", "approximation", "inference", "contrast")
    return pv.Gaps(
        elbo=zeros - 14.0,
        optimal_elbo=zeros - 11.0,
        log_evidence=zeros - 10.0,
        std_errors=dict.fromkeys(names, zeros + 0.1),
        converged=zeros == 0,
        evidence=evidence,
        family="the guide's own",
        num_particles=500,
        cost=2000,
    )


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_the_waterfall_steps_from_the_elbo_to_log_p():
    ax = plot_gaps(gaps_record())
    bars = [(bar.get_y(), bar.get_height()) for bar in ax.patches]
    assert bars == [pytest.approx(b) for b in ((-14.0, 3.0), (-11.0, 1.0), (-14.0, 4.0))]
    assert "nats" in ax.get_ylabel()
    low, high = ax.get_ylim()
    assert low < -14.0 and high > -10.0


def test_hatches_differ_so_that_black_and_white_will_do():
    ax = plot_gaps(gaps_record())
    assert len({bar.get_hatch() for bar in ax.patches}) == 3


@pytest.mark.parametrize("shape", [(7, 64), (7, 8, 8), (7, 1, 8, 8)])
def test_images_of_every_layout_are_shown_in_order(shape):
    data = torch.arange(7.0).reshape(7, *[1] * (len(shape) - 1)).expand(shape)
    ax = plot_reconstructions(pv.Reconstruction(observed={"x": data}, means={"x": data + 10}), num_images=5)
    sheet = ax.images[0].get_array()
    assert sheet.shape == (17, 44)
    assert [sheet[0, 9 * i] for i in range(5)] == list(range(5))
    assert [sheet[16, 9 * i] for i in range(5)] == [10 + i for i in range(5)]


def test_samples_and_a_given_ax():
    _, ax = plt.subplots()
    means = torch.rand(9, 16)
    assert plot_samples(pv.Simulation(observed={}, latents={}, means={"x": means}), ax=ax) is ax
    assert ax.images[0].get_array().shape == (9, 24)
    assert plot_gaps(gaps_record(), ax=plt.subplots()[1]).figure is not ax.figure


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match=r"\(7, 63\)"):
        plot_samples(pv.Simulation(observed={}, latents={}, means={"x": torch.rand(7, 63)}))


def test_a_likelihood_without_a_mean_is_refused():
    with pytest.raises(ValueError, match="mean"):
        plot_samples(pv.Simulation(observed={}, latents={}, means={}))
