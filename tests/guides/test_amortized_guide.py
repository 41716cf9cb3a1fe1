"""Guides made from the model alone: where their latents lie, what they train to, and that they live as modules do."""

import copy
import io
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from amortized_programs import CASES, mixture, two_layers, two_layers_log_p
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.poutine.util import site_is_subsample
from torch import nn

import pyro_vae as pv

FAMILIES = ["diagonal", "full", "flow"]
OPTIONS = [{"family": family, "conditioned": conditioned} for family in FAMILIES for conditioned in (False, True)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("case", CASES)
def test_the_sites_are_those_of_the_model(case, options):
    """Names in the model's order, plates, and values that the model gives a density."""
    guide = CASES[case].guide(**options)
    trace = poutine.trace(guide).get_trace(CASES[case].x)
    theirs = poutine.trace(poutine.replay(CASES[case].model, trace)).get_trace(CASES[case].x)
    nodes = {n: theirs.nodes[n] for n in theirs.stochastic_nodes if not site_is_subsample(theirs.nodes[n])}
    latents = [n for n, node in nodes.items() if not node["infer"].get("enumerate")]
    assert [n for n in trace.stochastic_nodes if n in latents] == latents
    for name in latents:
        ours, model = trace.nodes[name], theirs.nodes[name]
        assert ours["value"].shape == model["value"].shape
        assert {f.name: (f.dim, f.size) for f in ours["cond_indep_stack"]} == {
            f.name: (f.dim, f.size) for f in model["cond_indep_stack"]
        }
        assert ours["fn"].log_prob(ours["value"]).shape == ours["fn"].batch_shape
        assert bool(model["fn"].log_prob(ours["value"]).isfinite().all())


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("case", CASES)
def test_a_datum_sees_its_own_row_alone(case, options):
    """log q of the first datum is that of a batch of one: no number of another datum gets into it."""
    guide, x = CASES[case].guide(**options), CASES[case].x
    trace = poutine.trace(guide).get_trace(x)
    values = {n: trace.nodes[n]["value"] for n in guide.names}
    dim = guide.layout.datum_dim
    alone = {}
    for name, value in values.items():
        event_dim = trace.nodes[name]["fn"].event_dim
        alone[name] = value.narrow(dim - event_dim, 0, 1)
    one = poutine.trace(poutine.condition(guide, alone)).get_trace(x[:1])
    one.compute_log_prob()
    trace.compute_log_prob()
    for name in guide.names:
        expected = trace.nodes[name]["unscaled_log_prob"].narrow(dim, 0, 1)
        torch.testing.assert_close(one.nodes[name]["unscaled_log_prob"], expected)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("case", CASES)
def test_particles_side_by_side_are_those_one_by_one(case, options):
    """Under a vectorised plate of particles, log q at the same values is that of single runs."""
    guide, x = CASES[case].guide(**options), CASES[case].x
    dim = -1 - guide.layout.num_plates
    with pyro.plate("particles", 3, dim=dim):
        trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    for k in range(3):
        values = {}
        for name in guide.names:
            site = trace.nodes[name]
            width = guide.layout.num_plates + site["fn"].event_dim
            value = site["value"].expand(3, *site["value"].shape[-width:])[k] if width else site["value"][k]
            batch = max(-frame.dim for frame in guide.frames[name])
            values[name] = value.reshape(value.shape[guide.layout.num_plates - batch :])
        one = poutine.trace(poutine.condition(guide, values)).get_trace(x)
        one.compute_log_prob()
        for name in guide.names:
            ours = one.nodes[name]["unscaled_log_prob"]
            theirs = trace.nodes[name]["unscaled_log_prob"][k]
            torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=1e-4, atol=1e-5)


def test_full_is_one_normal_for_all_latents_of_a_datum():
    """log q is a quadratic form of all numbers, with terms between sites, and its integral is one."""
    guide, x = CASES["two layers"].guide(family="full").double(), CASES["two layers"].x[:1].double()

    def log_q(u):
        values = {"top": u[None, :2], "below": u[None, 2:]}
        trace = poutine.trace(poutine.condition(guide, values)).get_trace(x)
        return trace.log_prob_sum()

    points = torch.randn(3, 4, dtype=torch.float64)
    hessians = [torch.autograd.functional.hessian(log_q, u) for u in points]
    torch.testing.assert_close(hessians[0], hessians[1])
    torch.testing.assert_close(hessians[0], hessians[2])
    precision = -hessians[0]
    assert float(precision[:2, 2:].detach().abs().max()) > 1e-3
    gradient = torch.autograd.functional.jacobian(log_q, points[0])
    mean = points[0] + torch.linalg.solve(precision, gradient)
    expected = torch.distributions.MultivariateNormal(mean, precision_matrix=precision).log_prob(points[1])
    torch.testing.assert_close(log_q(points[1]), expected)


def trained(model, guide, x, steps, lr, loss):
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.01 ** (1 / steps)}), loss)
    return [svi.step(x) / len(x) for _ in range(steps)]


@pytest.mark.parametrize("conditioned", [False, True])
def test_a_full_guide_reaches_log_p_of_a_linear_gaussian(conditioned):
    """Approximation gap 0 within .01 nats: the posterior over both layers is one normal, linear in x."""
    x = pv.simulate(two_layers, torch.zeros(50, 2), seed=1).observed["obs"]
    guide = pv.AmortizedGuide(two_layers, nn.Linear(2, 8), (x,), family="full", conditioned=conditioned)
    trained(two_layers, guide, x, 600, 0.05, Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1))
    elbo = pv.ImportanceSampling(two_layers, guide, num_particles=1000, seed=0)(x).elbo.mean()
    assert abs(float(elbo - two_layers_log_p(x).mean())) < 0.01


def test_a_diagonal_guide_keeps_a_gap_that_conditioning_closes():
    x = pv.simulate(two_layers, torch.zeros(50, 2), seed=1).observed["obs"]
    elbo = {}
    for conditioned in (False, True):
        torch.manual_seed(0)
        guide = pv.AmortizedGuide(two_layers, nn.Linear(2, 16), (x,), conditioned=conditioned)
        loss = TraceMeanField_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
        trained(two_layers, guide, x, 400, 0.05, loss)
        elbo[conditioned] = float(pv.ImportanceSampling(two_layers, guide, num_particles=99, seed=0)(x).elbo.mean())
    log_p = float(two_layers_log_p(x).mean())
    assert elbo[False] < elbo[True] - 0.1 < log_p


def test_what_the_model_enumerates_is_left_to_it():
    """The mixture's log p(x) is known; the guide draws z alone, and its evidence is that of both classes together."""
    case = CASES["mixture"]
    guide = case.guide()
    assert guide.names == ("z",)
    trained(mixture, guide, case.x, 30, 0.02, TraceEnum_ELBO(max_plate_nesting=1))
    found = pv.AutoEvidence(mixture, guide, tolerance=0.01, seed=0)(case.x)
    scale = 1.25**0.5
    parts = [torch.distributions.Normal(2.0 * k - 1.0, scale).log_prob(case.x[:, 0]) for k in range(2)]
    expected = torch.logsumexp(torch.stack(parts) + torch.tensor([[0.3], [0.7]]).log(), 0)
    assert bool(((found.log_evidence - expected).abs() < 0.05).all())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_estimators_take_it(case, family):
    """Importance sampling, gaps and a bound with weights per datum run on every structure."""
    guide, x, model = CASES[case].guide(family=family, conditioned=True), CASES[case].x, CASES[case].model
    found = pv.ImportanceSampling(model, guide, num_particles=10, seed=0)(x)
    assert bool(found.log_evidence.isfinite().all()) and not found.looped
    loss = pv.ImportanceWeightedELBO(num_particles=3)(model, guide)(x)
    loss.backward()
    assert all(p.grad is not None for p in guide.network.parameters())


def test_subsampled_by_the_model():
    """The network is given all data; the heads get the rows of those that the plate has drawn, and the plates agree."""

    def model(x):
        with pyro.plate("data", len(x), subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=x[index, 0])

    x = torch.arange(10.0).unsqueeze(-1)
    guide = pv.AmortizedGuide(model, nn.Linear(1, 3), (x,))
    trace = poutine.trace(guide).get_trace(x)
    index = trace.nodes["data"]["value"]
    assert len(index) == 4 and trace.nodes["z"]["scale"] == 2.5
    everything = poutine.trace(pv.AmortizedGuide(model, nn.Linear(1, 3), (x,))).get_trace(x)
    assert len(everything.nodes["z"]["value"]) == 4
    loc = guide.heads[0].network(guide.network(x[index]))[:, 0]
    torch.testing.assert_close(trace.nodes["z"]["fn"].loc, loc)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), pv.BetaTrace_ELBO())
    losses = [svi.step(x) for _ in range(400)]
    log_p = torch.distributions.Normal(0.0, 2.0**0.5).log_prob(x).sum()
    assert abs(sum(losses[-200:]) / 200 + float(log_p)) < 10  # four standard errors: losses vary by 35


def test_subsampled_by_the_caller():
    """The model is given a batch and knows how many data there are."""

    def model(x):
        with pyro.plate("data", 100, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(z, 1.0), obs=x[:, 0])

    guide = pv.AmortizedGuide(model, nn.Linear(1, 3), (torch.zeros(5, 1),))
    for size in (5, 2, 8):
        trace = poutine.trace(guide).get_trace(torch.zeros(size, 1))
        assert trace.nodes["z"]["value"].shape == (size,) and trace.nodes["z"]["scale"] == 100 / size


def test_what_all_data_share_gets_parameters_of_its_own():
    def model(x):
        shift = pyro.sample("shift", dist.Normal(0.0, 2.0))
        with pyro.plate("components", 3):
            spread = pyro.sample("spread", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(shift, spread.sum(-1)))
            pyro.sample("obs", dist.Normal(z, 0.5), obs=x[:, 0])

    for family in FAMILIES:
        torch.manual_seed(0)
        guide = pv.AmortizedGuide(model, nn.Linear(1, 8), (torch.zeros(5, 1),), family=family, conditioned=True)
        trace = poutine.trace(guide).get_trace(torch.zeros(7, 1))
        assert [trace.nodes[n]["value"].shape for n in ("shift", "spread", "z")] == [(), (3,), (7,)]
        x = 3.0 + torch.randn(40, 1)
        losses = trained(model, guide, x, 100, 0.05, pv.BetaTrace_ELBO())
        assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_the_whole_call_as_one_datum():
    def model(x):
        shift = pyro.sample("shift", dist.Normal(0.0, 2.0))
        with pyro.plate("schools", len(x)):
            effect = pyro.sample("effect", dist.Normal(shift, 1.0))
            pyro.sample("obs", dist.Normal(effect, 1.0), obs=x)

    x = torch.tensor([1.0, 2.0, 4.0])
    guide = pv.AmortizedGuide(model, nn.Linear(3, 8), (x,), family="full", datum_plate=None)
    trained(model, guide, x, 600, 0.05, Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1))
    covariance = 4.0 * torch.ones(3, 3) + 2.0 * torch.eye(3)
    log_p = torch.distributions.MultivariateNormal(torch.zeros(3), covariance).log_prob(x)
    found = pv.ImportanceSampling(model, guide, num_particles=2000, datum_plate=None, seed=0)(x)
    assert abs(float(found.elbo[0] - log_p)) < 0.01


def test_masks_of_the_model_are_carried_over():
    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(mask))
            pyro.sample("obs", dist.Normal(torch.where(mask, z, torch.zeros(())), 1.0), obs=x)

    class Network(nn.Linear):
        def forward(self, x, mask):
            return super().forward(x.unsqueeze(-1))

    x, mask = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True])
    guide = pv.AmortizedGuide(model, Network(1, 4), (x, mask))
    found = pv.AdaptiveImportanceSampling(model, guide, num_particles=200, seed=0)(x, mask)
    scale = torch.where(mask, 2.0**0.5, 1.0)
    expected = torch.distributions.Normal(0.0, scale).log_prob(x)
    assert bool(((found.log_evidence - expected).abs() < 4 * found.std_error + 1e-5).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_saved_guides_train_on(family):
    case = CASES["two layers"]
    guide = case.guide(family=family)
    trained(case.model, guide, case.x, 3, 0.01, Trace_ELBO())
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    torch.manual_seed(5)
    loaded = case.guide(family=family)
    loaded.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide)), loaded):
        for x in (case.x, case.x[:2]):
            torch.manual_seed(1)
            ours = guide(x)
            torch.manual_seed(1)
            theirs = other(x)
            assert all(torch.equal(ours[n], theirs[n]) for n in guide.names)
        before = [p.detach().clone() for p in other.parameters()]
        kept = [p.detach().clone() for p in guide.parameters()]
        trained(case.model, other, case.x, 2, 0.01, Trace_ELBO())
        assert not all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(kept, guide.parameters(), strict=True))


def test_all_parameters_are_there_from_the_start():
    """So that torch.optim trains them; making a guide changes nothing in the network or the store."""
    case = CASES["eight schools"]
    network = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    state = copy.deepcopy(network.state_dict())
    pyro.clear_param_store()
    guide = pv.AmortizedGuide(case.model, network.eval(), (case.x,))
    assert all(torch.equal(v, network.state_dict()[n]) for n, v in state.items())
    assert not list(pyro.get_param_store())
    loss = pv.BetaTrace_ELBO()(case.model, guide)
    names = [n for n, _ in guide.named_parameters()]
    loss(case.x).backward()
    assert names == [n for n, _ in guide.named_parameters()]
    assert all(p.grad is not None for p in guide.parameters())


def test_its_printed_form_shows_the_parts():
    text = repr(CASES["eight schools"].guide())
    assert "'mean'" in text and "'spread'" in text and "'effect'" in text and "MLP" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_double_precision(family):
    case = CASES["eight schools"]
    guide = pv.AmortizedGuide(case.model, pv.nn.MLP(8, 4).double(), (case.x.double(),), family=family)
    assert all(p.dtype == torch.float64 for p in guide.parameters())
    values = guide(case.x.double())
    assert all(v.dtype == torch.float64 for v in values.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["two layers", "Gamma-Poisson", "Dirichlet"])
def test_under_autocast(case, family):
    """The network runs in half precision, all else in full: draws are float32, and log p(x) is that without autocast."""
    guide, x, model = CASES[case].guide(family=family, conditioned=True), CASES[case].x, CASES[case].model
    estimator = pv.AdaptiveImportanceSampling(model, guide, num_particles=300, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these guides are not trained
        plain = estimator(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = estimator(x)
            pv.BetaTrace_ELBO()(model, guide)(x).backward()
    off, error = found.log_evidence - plain.log_evidence, (found.std_error**2 + plain.std_error**2).sqrt()
    good = found.reliable & plain.reliable
    assert bool(good.any()) and bool((off.abs() < 5 * error + 1e-4)[good].all())
