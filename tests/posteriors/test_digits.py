"""Real digits and a decoder that is no formula, against quadrature over two latents."""

import pyro
import torch
from pair_helpers import assert_near, quiet
from pyro.infer import SVI, Trace_ELBO
from sklearn.datasets import load_digits

import pyro_vae as pv


def fine_grid(vae, x):
    """Cells of width .015 where the posterior of one of the data is above e^-30 of its peak.

    They are pieces of cells of width .12. All have an edge at 0, where one value jumps.
    """
    axis = (torch.arange(100) + 0.5) * 0.12 - 6
    coarse = torch.cartesian_prod(axis, axis)
    log_prior, likelihood = vae.prior().log_prob(coarse), vae.decode(coarse)
    log_joint = torch.stack([log_prior + likelihood.log_prob(datum) for datum in x])
    near = (log_joint > log_joint.amax(1, keepdim=True) - 30).any(0)
    step = (torch.arange(8) - 3.5) * 0.015
    return (coarse[near].unsqueeze(1) + torch.cartesian_prod(step, step)).flatten(0, 1)


def test_expectations_on_digits_equal_quadrature():
    """The encoder is trained for a short time only, so its own values are off by many errors; the posterior's are right."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    digits = torch.tensor(load_digits().data, dtype=torch.float)
    vae = pv.mlp_vae(64, latent_dim=2, likelihood=pv.nn.Binomial(16))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 2e-3}), Trace_ELBO())
    for _ in range(300):
        svi.step(digits[torch.randint(1500, (100,))])
    vae.eval()
    x = digits[1500:1504]

    def f(latents):
        z = latents["latent"]
        return torch.cat([z, (z[..., :1] > 0).float(), vae.decode(z).mean[..., 10:50:5]], -1)

    with torch.no_grad():
        grid = fine_grid(vae, x)
        log_prior, likelihood = vae.prior().log_prob(grid), vae.decode(grid)
        values = f({"latent": grid}).double()
        truth = []
        for datum in x:
            share = (log_prior + likelihood.log_prob(datum)).double().softmax(0)
            assert float(share.max()) < 0.01  # the grid is fine enough
            truth.append(share @ values)
    with quiet():
        record = pv.PosteriorExpectation(vae.model, vae.guide, f, num_particles=4000, seed=0)(x)
    for i in range(3):
        assert_near(record.value[:, i].double(), torch.stack(truth)[:, i], record.std_error[:, i].double() + 1e-4, 0.02)
    pixels = torch.stack(truth)[:, 3:].flatten()
    assert_near(record.value[:, 3:].flatten().double(), pixels, record.std_error[:, 3:].flatten().double() + 1e-3, 0.1)
    assert float((record.bias / record.bias_std_error)[:, :2].abs().max()) > 10
