"""The VAE of data with holes: what is missing has no density and no gradient, and all else is as without holes."""

import copy
import math
import pickle
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, assert_near
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import MultivariateNormal
from vae_helpers import ByHand, assert_all_moved, assert_same, snapshot, svi_of

import pyro_vae as pv
from pyro_vae.errors import ArgumentError, OptionError, StructureError
from pyro_vae.models import MissingDataVAE, mlp_missing_vae
from pyro_vae.nn import BesideMask, StandardNormal

S2 = 0.3  # noise variance


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def with_holes(x, share=0.3, seed=0):
    """A row without holes first, then one that is nothing but holes, then `share` of them."""
    holes = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < share
    holes[0], holes[1] = False, True
    return x.masked_fill(holes, math.nan)


def linear_vae(dtype=F64):
    """z ~ N(0, I), x ~ N(W z + b, s^2 I) with p(z given what was seen) as the guide; W and b."""
    generator = torch.Generator().manual_seed(0)
    w, b = (torch.randn(*shape, generator=generator, dtype=F64).to(dtype) for shape in ((6, 2), (6,)))

    def posterior(x_and_mask):
        x, seen = x_and_mask.chunk(2, 1)
        precision = torch.eye(2, dtype=dtype) + torch.einsum("xd,bx,xe->bde", w, seen, w) / S2
        loc = torch.linalg.solve(precision, ((x - b) * seen) @ w / S2)
        return dist.MultivariateNormal(loc, precision_matrix=precision)

    decoder = Function(lambda z: dist.Normal(z @ w.T + b, S2**0.5).to_event(1))
    return MissingDataVAE(Function(posterior), decoder, StandardNormal(2).to(dtype)), w, b


def data(num_data=10, dtype=F64):
    return with_holes(2 * torch.randn(num_data, 6, generator=torch.Generator().manual_seed(1), dtype=F64)).to(dtype)


def gaussian_evidence(x, w, b):
    """log p of what was seen, row by row: a Gaussian without the rows and columns that are missing."""
    covariance, found = w @ w.T + S2 * torch.eye(6, dtype=x.dtype), []
    for row in x:
        seen = ~row.isnan()
        fn = MultivariateNormal(b[seen], covariance[seen][:, seen]) if seen.any() else None
        found.append(fn.log_prob(row[seen]) if fn else row.new_zeros(()))
    return torch.stack(found)


def test_with_the_exact_guide_every_draw_gives_log_p_of_what_was_seen():
    vae, w, b = linear_vae()
    x = data()
    truth = gaussian_evidence(x, w, b)
    assert x[1].isnan().all() and truth[1] == 0 and not x[0].isnan().any() and 0.2 < x.isnan().double().mean() < 0.5
    for estimator in (
        pv.ImportanceSampling(vae.model, vae.guide, num_particles=3, seed=0),
        pv.ImportanceSampling(vae.model, vae.guide, num_particles=1, seed=1),
    ):
        torch.testing.assert_close(estimator(x).log_evidence, truth, rtol=0, atol=1e-10)
        torch.testing.assert_close(estimator(x[2:3]).log_evidence, truth[2:3], rtol=0, atol=1e-10)
    for objective in (Trace_ELBO(), pv.BetaTrace_ELBO(), pv.ImportanceWeightedELBO(num_particles=2)):
        assert objective.loss(vae.model, vae.guide, x) == pytest.approx(-float(truth.sum()), abs=1e-8)
    single = linear_vae(torch.float32)[0]
    found = pv.ImportanceSampling(single.model, single.guide, num_particles=3, seed=0)(x.float()).log_evidence
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-3)


def test_it_goes_through_the_estimators():
    """At the exact guide; simulated data keep their holes. Annealing has a false alarm in 2e-5 of seeds."""
    vae, w, b = linear_vae()
    x = data()
    truth = gaussian_evidence(x, w, b)
    gaps = pv.InferenceGaps(vae.model, vae.guide, num_particles=100, seed=0)(x)
    torch.testing.assert_close(gaps.elbo, truth, rtol=0, atol=1e-8)
    assert float(gaps.inference.abs().max()) < 0.1
    evidence = partial(pv.ImportanceSampling, num_particles=2, check=False)
    check = pv.SelfCheck(vae.model, vae.guide, evidence=evidence, num_steps=5, num_chains=2, seed=0, progress=False)(x)
    assert float(check.evidence.log_evidence[1].abs()) < 1e-10  # the row that is nothing but holes
    annealed = pv.AnnealedImportanceSampling(vae.model, vae.guide, num_steps=20, num_chains=4, seed=0)(x[2:5])
    assert_near(annealed.log_evidence, truth[2:5], annealed.std_error, 0.2)
    loader = [(x[:4],), (x[4:],)]
    result = pv.evaluate(pv.ImportanceSampling(vae.model, vae.guide, num_particles=2), loader, seed=0, progress=False)
    torch.testing.assert_close(result.log_evidence, truth, rtol=0, atol=1e-10)


# (likelihood, data (4, 5) in its support)
COUNTS = torch.tensor([[0, 3, 1, 2, 4], [1, 1, 0, 4, 2], [2, 0, 0, 3, 1], [4, 2, 2, 1, 0]]).float()
LIKELIHOODS = {
    "Normal": (pv.nn.Normal(), COUNTS - 2),
    "Normal learned": (pv.nn.Normal("learned"), COUNTS - 2),
    "StudentT": (pv.nn.StudentT(), COUNTS - 2),
    "Gamma": (pv.nn.Gamma(), COUNTS + 0.5),
    "LogNormal": (pv.nn.LogNormal(), COUNTS + 0.5),
    "Bernoulli": (pv.nn.Bernoulli(), (COUNTS > 1).float()),
    "ContinuousBernoulli": (pv.nn.ContinuousBernoulli(), COUNTS / 4),
    "Binomial": (pv.nn.Binomial(4), COUNTS),
    "Poisson": (pv.nn.Poisson(), COUNTS),
    "ZeroInflatedNegativeBinomial": (pv.nn.ZeroInflatedNegativeBinomial(), COUNTS),
    "Categorical": (pv.nn.Categorical(5), COUNTS),
    "DiscretizedLogistic": (pv.nn.DiscretizedLogistic(5), COUNTS),
    "DiscretizedLogisticMixture": (pv.nn.DiscretizedLogisticMixture(5, num_components=2), COUNTS),
    "Heterogeneous": (
        pv.nn.Heterogeneous([pv.nn.Normal(), pv.nn.Gamma(), pv.nn.Categorical(5), pv.nn.Poisson()], widths=(2, 1, 1, 1)),
        COUNTS + torch.tensor([0.3, -0.2, 0.5, 0.0, 0.0]),
    ),
}


class Recording(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.inputs = network, []

    def forward(self, z):
        self.inputs.append(z)
        return self.network(z)


def log_weight_by_hand(vae, network, row, legal, z):
    """log p(seen, z) - log q(z) of one row and one draw, number by number. `legal` is the row before it had holes."""
    seen = ~row.isnan()
    q = vae.encoder(torch.cat([row.nan_to_num(0.0), seen.to(row)]).unsqueeze(0))
    total = vae.prior().log_prob(z) - q.log_prob(z.unsqueeze(0))[0]
    numbers = network(z).base_dist.log_prob(legal)
    for i in seen.nonzero().flatten().tolist():
        total = total + numbers[i]
    return total


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_miwae_is_the_sum_by_hand_with_gradients_of_what_was_seen_alone(kind, num_particles):
    torch.manual_seed(0)
    head, legal = LIKELIHOODS[kind]
    vae = mlp_missing_vae(5, 2, likelihood=head, hidden=(6,)).double()
    legal = legal.double()
    x = with_holes(legal, 0.4)
    network = vae.decoder
    vae.decoder = Recording(network)
    objective = pv.ImportanceWeightedELBO(num_particles=num_particles)
    objective.loss(vae.model, vae.guide, x)  # the first call looks at the pair
    vae.decoder.inputs.clear()
    loss = objective.differentiable_loss(vae.model, vae.guide, x)
    z = vae.decoder.inputs[-1].reshape(num_particles, 4, 2)
    rows = [
        torch.stack([log_weight_by_hand(vae, network, row, legal[n], z[k, n]) for k in range(num_particles)])
        for n, row in enumerate(x)
    ]
    expected = -sum(row.logsumexp(0) - math.log(num_particles) for row in rows)
    torch.testing.assert_close(loss, expected.to(loss), rtol=1e-9, atol=1e-9)
    parameters = list(vae.parameters())
    grads = [torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True) for value in (loss, expected)]
    for found, right in zip(*grads, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-9)


def small_missing_vae():
    encoder = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4), pv.nn.Normal())
    return MissingDataVAE(encoder, nn.Sequential(nn.Linear(2, 6), pv.nn.Normal("learned")), StandardNormal(2))


class ByHandWithHoles(ByHand):
    """Numbers that are missing are left out of a sum, with indices instead of masks."""

    def __init__(self, vae):
        super().__init__(vae)
        encoder, decoder = vae.encoder, vae.decoder

        def encode(x):
            return encoder(torch.cat([x.nan_to_num(0.0), (~x.isnan()).to(x)], 1))

        class Seen:
            def __init__(self, fn):
                self.fn = fn

            def log_prob(self, x):
                rows, columns = (~x.isnan()).nonzero(as_tuple=True)
                loc, scale = self.fn.base_dist.loc, self.fn.base_dist.scale.expand(x.shape)
                numbers = dist.Normal(loc[rows, columns], scale[rows, columns]).log_prob(x[rows, columns])
                return x.new_zeros(len(x)).index_add(0, rows, numbers)

        class Parts:
            encoder, decoder, prior = staticmethod(encode), staticmethod(lambda z: Seen(decoder(z))), vae.prior
            zero_grad, parameters = vae.zero_grad, vae.parameters

        self.vae = Parts


INSTANCES = {
    "the first": lambda vae: vae,
    "a second one": lambda vae: small_missing_vae(),
    "a deep copy": copy.deepcopy,
    "unpickled": lambda vae: pickle.loads(pickle.dumps(vae)),
}


@pytest.mark.parametrize("instance", INSTANCES.values(), ids=INSTANCES)
def test_every_instance_learns_by_itself_what_training_by_hand_learns(instance):
    original, x = small_missing_vae(), data(dtype=torch.float32)
    svi_of(original).step(x)
    vae = instance(original)
    before, of_original, reference = snapshot(vae), snapshot(original), copy.deepcopy(vae)
    for train in (svi_of(vae), ByHandWithHoles(reference)):
        torch.manual_seed(0)
        for _ in range(3):
            train.step(x)
    assert_all_moved(vae, before)
    assert_same(vae.state_dict(), reference.state_dict())
    if vae is not original:
        assert_same(original.state_dict(), of_original)
    other = small_missing_vae()
    other.load_state_dict(vae.state_dict())
    assert torch.equal(other.encode(x).mean, vae.encode(x).mean)


def test_torch_optimisers_train_it_and_the_loss_falls():
    torch.manual_seed(0)
    vae, x = small_missing_vae(), data(num_data=50, dtype=torch.float32)
    loss = TraceMeanField_ELBO()(vae.model, vae.guide)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        losses.append(value.item())
        optimizer.step()
    assert sum(losses[-10:]) < sum(losses[:10]) - 10 * 100


def test_without_holes_it_is_the_vae():
    torch.manual_seed(0)
    missing, x = small_missing_vae().double(), torch.randn(10, 6, dtype=F64)
    with_mask = nn.Sequential(Function(lambda x: torch.cat([x, torch.ones_like(x)], 1)), missing.encoder)
    vae = pv.VAE(with_mask, missing.decoder, missing.prior)
    found = [pv.ImportanceSampling(v.model, v.guide, num_particles=50, seed=0)(x).log_evidence for v in (missing, vae)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_images_have_holes_too():
    class TwoChannels(nn.Module):
        def forward(self, x):
            assert x.shape[1:] == (2, 4, 4) and set(x[:, 1].unique().tolist()) <= {0.0, 1.0} and not x.isnan().any()
            return x

    torch.manual_seed(0)
    head = pv.nn.Bernoulli(event_dim=3)
    encoder = nn.Sequential(TwoChannels(), pv.nn.ConvNet((2, 4, 4), 4, channels=(3,)), pv.nn.Normal())
    vae = MissingDataVAE(encoder, nn.Sequential(pv.nn.DeconvNet(2, (1, 4, 4), channels=(3,)), head), StandardNormal(2))
    x = (torch.rand(5, 1, 4, 4) < 0.5).float()
    x[:, :, 2:] = math.nan  # the lower half
    before = snapshot(vae)
    svi_of(vae).step(x)
    assert_all_moved(vae, before)
    assert vae.reconstruct(x).isfinite().all() and vae.generate(3).shape == (3, 1, 4, 4)
    evidence = pv.AdaptiveImportanceSampling(vae.model, vae.guide, num_particles=100, seed=0)(x)
    assert not evidence.looped
    assert (evidence.log_evidence > -8 * math.log(2) - 8).all()  # eight pixels were seen, not sixteen


def test_the_encoder_sees_zeros_in_the_holes_behind_the_input_layer():
    nan, mask = math.nan, torch.tensor([[1.0, 0.0]])
    log = BesideMask(pv.nn.Log())(torch.cat([torch.tensor([[math.e, 0.0]]), mask], 1))
    torch.testing.assert_close(log, torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
    shifted = BesideMask(pv.nn.Scale(0.5, shift=-1.0))(torch.cat([torch.tensor([[4.0, 0.0]]), mask], 1))
    torch.testing.assert_close(shifted, torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
    classes = BesideMask(pv.nn.OneHot(2))(torch.cat([torch.tensor([[0.0, 0.0]]), mask], 1))
    torch.testing.assert_close(classes, torch.tensor([[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]]))
    seen = []
    vae = small_missing_vae()
    vae.encoder = nn.Sequential(Function(lambda x: seen.append(x) or x), vae.encoder)
    x = torch.tensor([[1.0, nan, 3.0, nan, 5.0, 6.0]])
    vae.encode(x), vae.guide(x)
    right = torch.tensor([[1.0, 0.0, 3.0, 0.0, 5.0, 6.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0]])
    assert len(seen) == 2 and all(torch.equal(each, right) for each in seen)


@pytest.mark.parametrize("kind", ["Bernoulli", "Gamma", "Categorical", "Heterogeneous"])
def test_what_was_seen_must_lie_in_the_support_in_training_too(kind):
    head, legal = LIKELIHOODS[kind]
    vae = mlp_missing_vae(5, 2, likelihood=head, hidden=())
    x = with_holes(legal, 0.4)
    svi_of(vae).step(x)
    wrong = x.clone()
    wrong[0, 3] = -1.5
    head_of_column = "Categorical .column 3." if kind == "Heterogeneous" else kind
    with pytest.raises(ValueError, match=rf"{head_of_column}.* head takes .* rows \[0\]"):
        svi_of(vae).step(wrong)


def test_a_likelihood_whose_numbers_are_not_independent_is_refused():
    x = data(dtype=torch.float32)
    for head, kind in (
        (pv.nn.MultivariateNormal(), "MultivariateNormal"),
        (pv.nn.Normal("optimal"), "computed from"),
    ):
        decoder = nn.Sequential(nn.Linear(2, head.num_outputs(6)), head)
        vae = MissingDataVAE(small_missing_vae().encoder, decoder, StandardNormal(2))
        with pytest.raises(StructureError, match=rf"numbers are independent.*{kind}.*pv.nn.Normal\('learned'\)"):
            svi_of(vae).step(x)
    with pytest.raises(OptionError, match=r"not possible with missing values: pass pv.nn.Normal\('learned'\)"):
        mlp_missing_vae(6, 2, likelihood=pv.nn.Normal("optimal"))


def test_other_data_are_refused_by_name():
    vae = small_missing_vae()
    with pytest.raises(ArgumentError, match=r"a row of numbers for each datum, \(B, X\).*unsqueeze"):
        vae.encode(torch.zeros(3))
    with pytest.raises(ArgumentError, match="event shape of the decoder's likelihood"):
        vae.model(torch.zeros(3, 5))
    with pytest.raises(ArgumentError, match=r"\(B, 2 X\).*torch.cat\(\[x, mask\], 1\)"):
        BesideMask(nn.Identity())(torch.zeros(3, 5))
    with pytest.raises(OptionError, match="layer must be an nn.Module, got .*input_layer"):
        BesideMask(lambda x: x)
