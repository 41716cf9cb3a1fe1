"""Claims about Pyro that docs/coming_from.md makes, measured.

    python tests/benchmarks/peers/check_pyro.py

The toy is z ~ N(0, 1), x given z ~ N(z, 1), so that log p(x) = log N(x; 0, 2); its guide has the posterior's variance and
means 0.3 too high. Seed 0 throughout.
"""

import copy
import pickle
import tempfile
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from claims import run
from pyro import poutine
from pyro.infer import SVI, Importance, RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.importance import psis_diagnostic, vectorized_importance_weights
from torch import nn

import pyro_vae as pv


def toy(num_data):
    """Model and guide of a batch of `num_data`."""

    def model(x):
        with pyro.plate("data", num_data, subsample_size=len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", num_data, subsample_size=len(x)):
            pyro.sample("latent", dist.Normal(x / 2 + 0.3, 0.5**0.5))

    return model, guide


def toy_data(num_data):
    pyro.set_rng_seed(0)
    return 2**0.5 * torch.randn(num_data)


def log_evidence(x):
    return dist.Normal(0.0, 2**0.5).log_prob(x)


class VAE(nn.Module):
    """As in Pyro's tutorial, small."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))


def change(vae, steps=20):
    """How far training moves the parameters of a pair, and the warnings that were given."""
    x = torch.ones(8, 4)
    before = [p.detach().clone() for p in vae.parameters()]
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            svi.step(x)
    moved = max((p.detach() - old).abs().max().item() for p, old in zip(vae.parameters(), before, strict=True))
    return moved, len(caught)


def second_vae():
    """A second VAE with the same pyro.module names is not trained by SVI, and nothing says so; nor is a copy."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    first = VAE()
    vaes = {
        "first": first,
        "second": VAE(),
        "deep copy": copy.deepcopy(first),
        "unpickled": pickle.loads(pickle.dumps(first)),
    }
    vaes |= {f"pv.mlp_vae {n}": pv.mlp_vae(4, latent_dim=2, likelihood=pv.nn.Bernoulli()) for n in (1, 2)}
    moved = {name: change(vae) for name, vae in vaes.items()}
    pyro.clear_param_store()
    moved["after clear_param_store"] = change(VAE())
    still = {name for name, (size, _) in moved.items() if size == 0}
    silent = all(num_warnings == 0 for _, num_warnings in moved.values())
    line = "largest change of a parameter: " + ", ".join(f"{name} {size:.3f}" for name, (size, _) in moved.items())
    return still == {"second", "deep copy", "unpickled"} and silent, line


def loaded_store():
    """A store that is loaded does not reach the networks of a new VAE; update_module_params=True copies it there."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    trained, x = VAE(), torch.ones(8, 4)
    change(trained)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "store.pt")
        pyro.get_param_store().save(path)
        pyro.clear_param_store()
        pyro.get_param_store().load(path)
    new = VAE()
    new.model(x), new.guide(x)
    untouched = not torch.equal(new.decoder.weight, trained.decoder.weight)
    pyro.module("decoder", new.decoder, update_module_params=True)
    copied = torch.equal(new.decoder.weight, trained.decoder.weight)
    return untouched and copied, f"weights are the trained ones: {not untouched} after a call, {copied} after the copy"


def renyi_subsampled():
    """RenyiELBO(alpha=0) on a subsampled plate has N/B inside the logarithm: its bound lies above log p(x)."""
    x = toy_data(1000)
    pair = toy(1000)

    def bound(objective):
        batches = (x[torch.randperm(1000)[:50]] for _ in range(400))
        values = -torch.tensor([objective.loss(*pair, batch) for batch in batches]) / 1000
        return values.mean(), values.std() / 20

    theirs, error = bound(RenyiELBO(alpha=0, num_particles=5))
    ours, _ = bound(pv.ImportanceWeightedELBO(num_particles=5))
    truth = log_evidence(x).mean()
    line = f"K = 5, nats per datum: RenyiELBO {theirs:.3f} +- {error:.3f}, ours {ours:.3f}, log p(x) {truth:.3f}"
    return bool(theirs - 5 * error > truth), line


def renyi_full():
    """RenyiELBO(alpha=0) on a full plate without scales is the importance-weighted bound, one weight per datum."""
    x = toy_data(1000)
    model, guide = toy(1000)
    theirs = -torch.tensor([RenyiELBO(alpha=0, num_particles=5).loss(model, guide, x) for _ in range(50)]) / 1000
    objective = pv.ImportanceWeightedELBO(num_particles=5)
    ours = -torch.tensor([objective.loss(model, guide, x) for _ in range(50)]) / 1000
    error = (theirs.var() / 50 + ours.var() / 50).sqrt()
    line = f"K = 5, nats per datum: RenyiELBO {theirs.mean():.4f}, ours {ours.mean():.4f}, difference +- {error:.4f}"
    return bool((theirs.mean() - ours.mean()).abs() < 5 * error), line


def renyi_module():
    """RenyiELBO does not work as a module under torch.optim."""
    vae, objective = pv.mlp_vae(4, latent_dim=2, likelihood=pv.nn.Bernoulli()), pv.ImportanceWeightedELBO(num_particles=2)
    ours = objective(vae.model, vae.guide)(torch.ones(8, 4))
    try:
        RenyiELBO(alpha=0, num_particles=2)(vae.model, vae.guide)(torch.ones(8, 4))
    except AttributeError as error:
        return ours.requires_grad, f"AttributeError: {error}"
    return False, "works"


def renyi_discrete():
    """RenyiELBO(alpha=0) has no gradient for the guide of a discrete latent."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Categorical(logits=torch.tensor([0.1, 0.5, -0.3])))
            pyro.sample("obs", dist.Normal(torch.tensor([-1.0, -0.2, -2.0])[z], 1.0), obs=x)

    def guide(x):
        logits = pyro.param("logits", torch.tensor([0.2, -0.1, 0.4]))
        with pyro.plate("data", len(x)):
            pyro.sample("latent", dist.Categorical(logits=logits))

    def gradient(objective):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        objective.loss_and_grads(model, guide, torch.full((200_000,), 0.3))
        return [round(-g / 200_000, 3) + 0.0 for g in pyro.get_param_store().get_param("logits").grad.tolist()]

    theirs = gradient(RenyiELBO(alpha=0, num_particles=2))
    ours = gradient(pv.ImportanceWeightedELBO(num_particles=2))
    return theirs == [0, 0, 0], f"K = 2: RenyiELBO {theirs}, ours {ours}, exact [0.044, 0.428, -0.472]"


def joint_weights():
    """Importance and vectorized_importance_weights have one weight per particle for all data of the call."""
    x = toy_data(1000)
    model, guide = toy(1000)
    log_weights, _, _ = vectorized_importance_weights(model, guide, x, num_samples=200, max_plate_nesting=1)
    importance = Importance(model, guide, num_samples=200).run(x)
    theirs, ess = importance.get_log_normalizer().item() / 1000, importance.get_ESS().item()
    ours = pv.ImportanceSampling(model, guide, num_particles=200)(x)
    line = f"weights {tuple(log_weights.shape)}; K = 200, nats per datum: Importance {theirs:.3f} (ESS {ess:.1f}), ours "
    line += f"{ours.mean().value:.3f} (ESS {ours.ess.mean():.0f}), log p(x) {log_evidence(x).mean():.3f}"
    return log_weights.shape == (200,) and theirs < ours.mean().value - 0.01, line


def joint_k():
    """psis_diagnostic gives one Pareto k for the whole batch, and calls a guide bad whose k is good for every datum."""
    x = toy_data(1000)
    model, guide = toy(1000)
    theirs = psis_diagnostic(model, guide, x, num_particles=1000, max_plate_nesting=1)
    ours = pv.ImportanceSampling(model, guide, num_particles=1000)(x).pareto_k
    line = f"one k: {theirs:.2f}; per datum at most {ours.max():.2f}"
    return isinstance(theirs, float) and bool(theirs > 0.7 > ours.max()), line


def joint_wake_sleep():
    """ReweightedWakeSleep has one weight per particle for the whole batch."""
    x = toy_data(50)
    model, guide = toy(50)
    wake_sleep = ReweightedWakeSleep(num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    theirs = torch.tensor([wake_sleep.loss(model, guide, x)[0] for _ in range(100)]) / 50
    objective = pv.ImportanceWeightedELBO(num_particles=100)
    ours = torch.tensor([objective.loss(model, guide, x) for _ in range(100)]) / 50
    truth = -log_evidence(x).mean()
    line = f"K = 100, loss per datum: {theirs.mean():.4f} +- {theirs.std() / 10:.4f}, with one weight per datum "
    line += f"{ours.mean():.4f} +- {ours.std() / 10:.4f}, -log p(x) {truth:.4f}"
    return bool(theirs.mean() > ours.mean() + 5 * theirs.std() / 10), line


def scale_zero():
    """poutine.scale refuses zero, so that a weight on the KL cannot start there."""
    try:
        poutine.scale(scale=0.0)
    except ValueError as error:
        return True, f"ValueError: {error}"
    return False, "accepted"


def scale_on_one_side():
    """poutine.scale on the model's latent alone: TraceMeanField_ELBO takes no notice of beta, without a word."""
    x = toy_data(1000)
    _, guide = toy(1000)

    def loss(beta):
        def model(x):
            with pyro.plate("data", 1000):
                with poutine.scale(scale=beta):
                    z = pyro.sample("latent", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("obs", dist.Normal(z, 1.0), obs=x)

        pyro.set_rng_seed(1)
        return TraceMeanField_ELBO().loss(model, guide, x) / 1000

    one, four = loss(1.0), loss(4.0)
    pyro.set_rng_seed(1)
    ours = pv.BetaTraceMeanField_ELBO(beta=4.0).loss(*toy(1000), x) / 1000
    return one == four, f"loss per datum at beta 1 and 4: {one:.4f} and {four:.4f}; BetaTraceMeanField_ELBO at 4: {ours:.4f}"


def one_float():
    """SVI.evaluate_loss returns minus the ELBO of the whole batch as one float."""
    x = toy_data(1000)
    model, guide = toy(1000)
    loss = SVI(model, guide, pyro.optim.Adam({}), Trace_ELBO(num_particles=100)).evaluate_loss(x)
    ours = pv.ImportanceSampling(model, guide, num_particles=1000)(x).elbo.mean()
    difference = abs(-loss / 1000 - ours)
    line = f"{type(loss).__name__}, {loss:.1f}; minus that per datum: {-loss / 1000:.4f}; ours, mean per datum: {ours:.4f}"
    return isinstance(loss, float) and bool(difference < 0.01), line


def grey_pixels():
    """A Bernoulli with validate_args=False, as in Pyro's VAE tutorial, scores grey pixels; their scores are no density."""
    grid = (torch.arange(1000) + 0.5) / 1000
    fn = dist.Bernoulli(probs=torch.tensor(0.9), validate_args=False)
    mass = fn.log_prob(grid).exp().mean().item()
    return abs(mass - 1) > 0.1, f"integral over x in (0, 1) at probability 0.9: {mass:.3f}"


if __name__ == "__main__":
    checks = [second_vae, loaded_store, renyi_subsampled, renyi_full, renyi_module, renyi_discrete, joint_weights, joint_k]
    checks += [joint_wake_sleep, scale_zero, scale_on_one_side, one_float, grey_pixels]
    run("pyro-ppl", "1.9.2", checks)
