"""Layers of latents: judged by the normal distribution that linear ones amount to."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from hierarchical_helpers import TwoLayers, small_hierarchical
from markov_helpers import Returns
from pair_helpers import SIGMAS, assert_near, quiet
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from vae_helpers import assert_all_moved, assert_same, small_data, snapshot, svi_of

import pyro_vae as pv
from pyro_vae.errors import ArgumentError, EmptyBatchError, OptionError, StructureError
from pyro_vae.models import HierarchicalVAE

KINDS = ["bottom-up", "ladder"]
each = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def known():
    return TwoLayers()


def data(known, size=6):
    return known.joint([*known.X]).sample((size,))


# What is right


@each
def test_exact_guides_give_the_normal_density(known, kind):
    vae, x = known.exact_vae(kind), data(known)
    estimator = pv.ImportanceSampling(vae.model, vae.guide, num_particles=3, seed=0)
    found, right = estimator(x), known.log_evidence(x)
    torch.testing.assert_close(found.log_evidence, right, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.elbo, right, rtol=0, atol=1e-10)
    assert [known[-2:] for known in estimator._pair._known.values()] == [("leading", "leading")]
    for objective in (pv.BetaTrace_ELBO(), pv.ImportanceWeightedELBO(num_particles=3)):
        assert float(objective.loss(vae.model, vae.guide, x)) == pytest.approx(-float(right.sum()))


@pytest.mark.parametrize(("kind", "steps", "largest"), [("bottom-up", 100, 3.0), ("ladder", 400, 0.01)])
def test_a_full_guide_learns_the_posterior(known, kind, steps, largest):
    """Evidence of six data within 4.5 errors of at most .03 nats, false alarms in 4e-5 of seeds; the mean gap in 4e-6."""
    vae, x, train = known.amortized(kind), data(known), data(known, 500)
    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.005 ** (1 / steps)})
    svi = SVI(vae.model, vae.guide, optim, pv.ImportanceWeightedELBO(num_particles=3, gradient="stl"))
    for _ in range(steps):
        svi.step(train[torch.randint(len(train), (64,))])
    found, right = pv.AdaptiveImportanceSampling(vae.model, vae.guide, num_particles=2000, seed=0)(x), known.log_evidence(x)
    assert_near(found.log_evidence, right, found.std_error, 0.03)
    with quiet():
        found = pv.ImportanceSampling(vae.model, vae.guide, num_particles=10_000, seed=0)(x)
    gap, error = float((right - found.elbo).mean()), float(found.elbo_std_error.square().sum().sqrt() / len(x))
    assert error < largest / 2 and -SIGMAS * error < gap < largest, (gap, error)


def test_a_shifted_guide_is_the_encoders_fault(known):
    """KL of two normals with one covariance; three data within 4.5 errors: false alarms in 6e-5 of seeds."""
    vae, x, shift = known.exact_vae("ladder"), data(known, 3), torch.tensor([0.3, -0.4], dtype=torch.float64)
    with torch.no_grad():
        vae.encoders[1].bias += shift
    gaps = pv.InferenceGaps(vae.model, vae.guide, num_particles=1500, seed=0)(x)
    right = (0.5 * shift @ known.posterior(x[0], 2).precision_matrix @ shift).expand(3)
    assert_near(gaps.log_evidence, known.log_evidence(x), gaps.std_errors["log_evidence"], 0.05)
    assert_near(gaps.amortization, right, gaps.std_errors["amortization"], 0.05)
    assert_near(gaps.approximation, torch.zeros(3).double(), gaps.std_errors["approximation"], 0.05)


def test_the_rates_of_a_ladder_are_those_of_its_layers(known):
    """A mean over 1500 particles within .03 nats, six errors; and one within 4.5: false alarms in 7e-6 of seeds."""
    vae, x = known.exact_vae("ladder"), data(known)
    right = known.rates(x)
    objective = pv.BetaTraceMeanField_ELBO(num_particles=1500, vectorize_particles=True, max_plate_nesting=1)
    objective.loss(vae.model, vae.guide, x)
    rates = {name: float(kl) / len(x) for name, kl in objective.terms.kl.items()}
    assert rates == pytest.approx(right, abs=0.03)
    assert rates["latent_2"] == pytest.approx(right["latent_2"], abs=1e-10)  # its formula needs no draws
    units = pv.ActiveUnits(vae.model, vae.guide, num_particles=1000, seed=0)([x], progress=False)
    for name, estimate in units.site_kl.items():
        assert float(estimate.value) == pytest.approx(right[name], abs=SIGMAS * float(estimate.std_error) + 1e-6)


@each
def test_surgery_has_the_sum_of_the_rates(known, kind):
    """One mean within 4.5 errors: false alarms in 7e-6 of seeds."""
    vae, x = known.exact_vae(kind), data(known, 40)
    found = pv.ELBOSurgery(vae.model, vae.guide, num_particles=50, seed=0)([x], progress=False)
    right = sum(known.rates(x).values())
    assert float(found.kl.std_error) < 0.1
    assert float(found.kl.value) == pytest.approx(right, abs=SIGMAS * float(found.kl.std_error))


# The programs and the object around them


@each
def test_sites_and_densities_are_those_of_the_networks(kind):
    vae, x = small_hierarchical(kind), small_data()
    guide = poutine.trace(vae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    guide.compute_log_prob(), model.compute_log_prob()
    up, down = ["latent_1", "latent_2", "latent_3"], ["latent_3", "latent_2", "latent_1"]
    names = [n for n, s in guide.nodes.items() if s["type"] == "sample"]
    assert names == ["data", *(up if kind == "bottom-up" else down)]
    assert [n for n, s in model.nodes.items() if s["type"] == "sample"] == ["data", *down, "obs"]
    z1, z2, z3 = (guide.nodes[name]["value"] for name in up)
    p = [vae.layers[0](z2).log_prob(z1), vae.layers[1](z3).log_prob(z2), vae.prior().log_prob(z3)]
    if kind == "bottom-up":
        q = [encoder(given).log_prob(z) for encoder, given, z in zip(vae.encoders, (x, z1, z2), (z1, z2, z3), strict=True)]
    else:
        h1 = vae.features[0](x)
        h2 = vae.features[1](h1)
        given = [(z2, h1), (z3, h2), (vae.features[2](h2),)]
        q = [encoder(*one).log_prob(z) for encoder, one, z in zip(vae.encoders, given, (z1, z2, z3), strict=True)]
    for trace, log_probs in ((model, p), (guide, q)):
        for name, log_prob in zip(up, log_probs, strict=True):
            torch.testing.assert_close(trace.nodes[name]["log_prob"], log_prob)
    torch.testing.assert_close(model.nodes["obs"]["log_prob"], vae.decode(z1).log_prob(x))


def test_generated_data_have_the_moments_of_the_model(known):
    """Four means and ten covariances, false alarms in 1e-4 of seeds."""
    x, n, right = known.exact_vae("ladder").generate(20_000), 20_000, known.joint([*known.X])
    variances, covariance = right.variance, right.covariance_matrix
    assert ((x.mean(0) - right.mean).abs() < SIGMAS * (variances / n).sqrt()).all()
    error = ((variances[:, None] * variances + covariance.square()) / n).sqrt()
    assert (error / variances.max()).max() < 0.02
    assert ((torch.cov(x.T) - covariance).abs() < SIGMAS * error).all()


@each
def test_a_reconstruction_is_the_mean_at_one_draw(kind):
    vae, x = small_hierarchical(kind), small_data()
    torch.manual_seed(0)
    shown = vae.reconstruct(x)
    torch.manual_seed(0)
    if kind == "bottom-up":
        z1 = vae.encoders[0](x).sample()
    else:
        h1 = vae.features[0](x)
        h2 = vae.features[1](h1)
        z3 = vae.encoders[2](vae.features[2](h2)).sample()
        z1 = vae.encoders[0](vae.encoders[1](z3, h2).sample(), h1).sample()
    torch.testing.assert_close(shown, vae.decode(z1).mean.detach())


def test_looking_at_it_leaves_no_trace():
    vae, x = small_hierarchical(), small_data()
    vae.decoder.insert(0, nn.Dropout(0.5))
    modes = [m.training for m in vae.modules()]
    with poutine.trace() as outer:
        shown = [vae.reconstruct(x), vae.generate(2)]
    assert not any(tensor.requires_grad for tensor in shown)
    assert [m.training for m in vae.modules()] == modes and not outer.trace.nodes and not pyro.get_param_store()


INSTANCES = {
    "a second one": small_hierarchical,
    "a deep copy": copy.deepcopy,
    "unpickled": lambda vae: pickle.loads(pickle.dumps(vae)),
}


@each
@pytest.mark.parametrize("instance", INSTANCES)
def test_two_in_one_process_learn_what_each_learns_alone(instance, kind):
    first, x = small_hierarchical(kind), small_data()
    svi_of(first).step(x)
    vae, of_first = INSTANCES[instance](kind if instance == "a second one" else first), snapshot(first)
    reference, before, svi = copy.deepcopy(vae), snapshot(vae), svi_of(vae)
    torch.manual_seed(0)
    for _ in range(3):
        svi.step(x)
    assert_all_moved(vae, before)
    assert_same(first.state_dict(), of_first)
    loss = Trace_ELBO()(reference.model, reference.guide)
    optimizers = [torch.optim.Adam([p], lr=0.02) for p in loss.parameters()]
    torch.manual_seed(0)
    for _ in range(3):
        reference.zero_grad()
        loss(x).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert_same(vae.state_dict(), reference.state_dict())


@each
def test_the_parts_are_seen_and_can_be_replaced(kind):
    vae = small_hierarchical(kind)
    for name in ("prior", "layers", "decoder", "encoders", *(["features"] if kind == "ladder" else [])):
        assert f"({name}): " in repr(vae)
        new = copy.deepcopy(getattr(vae, name))
        setattr(vae, name, new)
        owner = vae.guide if name in ("encoders", "features") else vae.model
        assert getattr(vae, name) is getattr(owner, name) is new
    assert set(dict(vae.named_children())) == {"model", "guide"}
    assert hasattr(vae, "features") is (kind == "ladder")
    other = small_hierarchical(kind)
    other.load_state_dict(vae.state_dict())
    torch.manual_seed(0)
    drawn = vae.generate(2)
    torch.manual_seed(0)
    assert torch.equal(other.generate(2), drawn)


# What is refused


def parts(kind="ladder"):
    vae = small_hierarchical(kind)
    names = ("prior", "layers", "decoder", "encoders", *(["features"] if kind == "ladder" else []))
    return {name: getattr(vae, name) for name in names}


WRONG_PARTS = {
    "an encoder too few": (
        "encoders",
        lambda old: old[:2],
        "features must have one module per layer of latents, 2 here, got 3",
    ),
    "a layer too many": ("layers", lambda old: [*old, old[0]], "encoders must have one.*4 here, got 3.*L - 1 layers"),
    "features for some": (
        "features",
        lambda old: old[:1],
        "features must have one module per layer of latents, 3 here, got 1",
    ),
    "no module in the list": ("layers", lambda old: [old[0], None], r"the layers\[1\] must be an nn.Module"),
    "no list": ("encoders", lambda old: old[0], "encoders must be a list of modules"),
    "nothing": ("layers", lambda old: None, "layers must be a list of modules.*got None"),
    "a prior that is none": ("prior", lambda old: None, "the prior must be an nn.Module"),
}


@pytest.mark.parametrize(("role", "change", "message"), WRONG_PARTS.values(), ids=WRONG_PARTS)
def test_there_is_a_module_for_every_layer(role, change, message):
    good = parts()
    with pytest.raises(OptionError, match=message):
        HierarchicalVAE(**{**good, role: change(good[role])})


WRONG_NETWORKS = {
    "latents of another size": (
        "layers",
        lambda z: dist.Normal(z[..., :2], 1.0).to_event(1),
        r"encoders\[0\] and layers\[0\]",
    ),
    "no event": ("layers", lambda z: dist.Normal(z, 1.0), r"the layers\[0\] must return one distribution per row"),
    "no distribution": ("encoders", lambda z, h: z, r"the encoders\[0\] must return a distribution"),
    "rows that are mixed": ("encoders", lambda z, h: dist.Normal(z.mean(0, True), 1.0).to_event(1), "per row"),
}


@pytest.mark.parametrize(("role", "function", "message"), WRONG_NETWORKS.values(), ids=WRONG_NETWORKS)
def test_networks_return_what_the_programs_need(role, function, message):
    vae = small_hierarchical()
    getattr(vae, role)[0] = Returns(function)
    with pytest.raises(StructureError, match=message):
        svi_of(vae).step(small_data())


@each
def test_data_are_rows(kind):
    vae = small_hierarchical(kind)
    for call in (svi_of(vae).step, vae.reconstruct):
        for x, error in ((None, ArgumentError), (torch.zeros(0, 6), EmptyBatchError)):
            with pytest.raises(error, match="x must"):
                call(x)
    vae.decoder = small_hierarchical().layers[0]
    with pytest.raises((ArgumentError, RuntimeError)):
        svi_of(vae).step(small_data())
    with pytest.raises(OptionError, match="n must be a whole number of at least 1"):
        vae.generate(0)
