"""DESIGN 5.4: a latent masked on one side is masked on both."""

import math
import re

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from kernel_helpers import (
    F64,
    assert_close,
    assert_weights,
    exact_pair,
    likelihood,
    linear_gaussian,
    normal,
    randn,
    standard_normal,
    tensor,
    weigh,
)

import pyro_vae as pv
from pyro_vae.errors import MaskError, UnreliableEvidenceWarning
from pyro_vae.evidence import ExactEvidence
from pyro_vae.kernel import Pair

ZERO = tensor(0.0)
PARTIAL = torch.tensor([True, False, True, True, False])


@pytest.fixture
def linear():
    lm, x = linear_gaussian()
    return (lm, x, *exact_pair(lm))


@pytest.mark.parametrize("mask", [PARTIAL, ~PARTIAL & PARTIAL, PARTIAL | ~PARTIAL, True, False])
@pytest.mark.parametrize("side", ["model", "guide", "both"])
@pytest.mark.parametrize("num_particles", [1, 4, 5])
def test_masked_data(linear, mask, side, num_particles):
    """Over the model: evidence 0 where masked. Over the guide alone z has no density where x reads it: refused."""
    lm, x, model, guide = linear
    masked_model = poutine.mask(model, mask=mask) if side in ("model", "both") else model
    masked_guide = poutine.mask(guide, mask=mask) if side in ("guide", "both") else guide
    everywhere = torch.as_tensor(mask).expand(5)
    if side == "guide" and not everywhere.all():
        with pytest.raises(MaskError, match="'z' of data"):
            weigh(masked_model, masked_guide, x, K=num_particles)
        return
    result = weigh(masked_model, masked_guide, x, K=num_particles)
    assert_weights(result, torch.where(everywhere, lm.log_evidence(x), ZERO))


@pytest.mark.parametrize("num_particles", [1, 4])
def test_a_mask_on_the_latent_statement_of_the_model_alone(linear, num_particles):
    lm, x, _, guide = linear

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=PARTIAL):
                z = pyro.sample("z", standard_normal(lm))
            pyro.sample("x", likelihood(lm, z), obs=x)

    with pytest.raises(MaskError, match=r"'z' of data \[1, 4\]"):
        weigh(model, guide, x, K=num_particles)


def test_different_masks_on_the_two_sides_are_combined(linear):
    lm, x, model, guide = linear
    more = torch.tensor([True, True, True, True, False])
    result = weigh(poutine.mask(model, mask=PARTIAL), poutine.mask(guide, mask=more), x)
    assert_weights(result, torch.where(PARTIAL, lm.log_evidence(x), ZERO))
    less = torch.tensor([True, True, False, True, False])
    with pytest.raises(MaskError, match=r"'z' of data \[2\]"):
        weigh(poutine.mask(model, mask=PARTIAL), poutine.mask(guide, mask=less), x)


@pytest.mark.parametrize("num_particles", [1, 4, 5])
def test_masks_change_between_calls(linear, num_particles):
    """Also after a first call in which all was there, and with NaN under the mask."""
    lm, x, model, guide = linear
    pair = Pair(
        lambda x, mask: poutine.mask(model, mask=mask)(x),
        lambda x, mask: guide(torch.nan_to_num(x)),
    )
    for mask in (PARTIAL | ~PARTIAL, PARTIAL, ~PARTIAL):
        data = torch.where(mask[:, None], x, torch.nan)
        result = weigh(None, None, data, mask, pair=pair, K=num_particles)
        assert_weights(result, torch.where(mask, lm.log_evidence(x), ZERO))


def test_a_mask_inside_a_nested_plate():
    """Missing pixels: evidence of the ones that are there."""
    num_data, parts, s = 4, 3, 0.6
    x = randn(num_data, parts)
    seen = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0]]).bool()

    def model(x):
        with pyro.plate("data", num_data, dim=-2):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            with pyro.plate("parts", parts, dim=-1), poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z, s), obs=x)

    def guide(x):
        precision = 1 + seen.to(F64).sum(-1, keepdim=True) / s**2
        with pyro.plate("data", num_data, dim=-2):
            mean = torch.where(seen, x, ZERO).sum(-1, keepdim=True) / s**2 / precision
            pyro.sample("z", dist.Normal(mean, precision**-0.5))

    expected = []
    for row, mask in zip(x, seen, strict=True):
        n = int(mask.sum())
        covariance = 1 + s**2 * torch.eye(n, dtype=F64)
        zero = torch.zeros(n, dtype=F64)
        expected.append(dist.MultivariateNormal(zero, covariance).log_prob(row[mask]) if n else ZERO)
    for data in (x, torch.where(seen, x, torch.nan)):
        for num_particles in (1, 3, 4):
            assert_weights(weigh(model, guide, data, K=num_particles), torch.stack(expected))


SEEN = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0]]).bool()


@pytest.mark.parametrize("fill", [None, 3.0, torch.nan])
def test_masked_elements_of_an_observed_event(linear, fill):
    """fn.mask(m).to_event(1) on an observed site: only what is seen counts or is looked at."""
    lm, x, _, _ = linear
    data = x if fill is None else torch.where(SEEN, x, torch.as_tensor(fill, dtype=F64))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard_normal(lm))
            mean = z @ lm.weight.T + lm.bias
            pyro.sample("x", dist.Normal(mean, lm.variance.sqrt()).mask(SEEN).to_event(1), obs=x)

    locs, trils = [], []
    for row, mask in zip(x, SEEN, strict=True):
        w = lm.weight[mask]
        precision = torch.eye(2, dtype=F64) + w.T @ w / lm.variance
        trils.append(torch.linalg.cholesky(precision.inverse()))
        locs.append(torch.linalg.solve(precision, w.T @ (row - lm.bias)[mask] / lm.variance))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(torch.stack(locs), scale_tril=torch.stack(trils)))

    expected = []
    for row, mask in zip(x, SEEN, strict=True):
        n, w = int(mask.sum()), lm.weight[mask]
        covariance = w @ w.T + lm.variance * torch.eye(n, dtype=F64)
        expected.append(dist.MultivariateNormal(lm.bias[mask], covariance).log_prob(row[mask]) if n else ZERO)
    assert_weights(weigh(model, guide, data), torch.stack(expected))


def test_masked_elements_may_lie_outside_the_support():
    """Missing pixels coded as -1 under a masked Bernoulli."""
    x = torch.where(SEEN, (randn(5, 3) > 0).to(F64), tensor(-1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z).mask(SEEN).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))

    result = weigh(model, guide, x)
    log_p = torch.nn.functional.logsigmoid(torch.where(x == 1, 1.0, -1.0) * result.values["z"])
    assert_close(result.log_weight, torch.where(SEEN, log_p, ZERO).sum(-1))


EVENT = torch.tensor([[True, False]] * 5)
ROWS = torch.stack([PARTIAL, PARTIAL], -1)


def event_masked(lm, model_mask, guide_mask, loc, read=True):
    """:param read: what of z the data depend on."""

    def masked(fn, mask):
        return (fn if mask is None else fn.mask(mask)).to_event(1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", masked(dist.Normal(torch.zeros(5, 2, dtype=F64), 1.0), model_mask))
            pyro.sample("x", likelihood(lm, z * read), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", masked(dist.Normal(loc, 0.5), guide_mask))

    return model, guide


@pytest.mark.parametrize("num_particles", [1, 4, 5])
def test_the_same_mask_inside_a_latent_event_on_both_sides(linear, num_particles):
    lm, x, _, _ = linear
    loc = lm.posterior(x).loc
    result = weigh(*event_masked(lm, EVENT, EVENT, loc, read=EVENT), x, K=num_particles)
    z = result.values["z"]
    assert_close(result.lw.log_prior, normal(z[..., 0], 0.0, 1.0))
    assert_close(result.lw.log_guide, normal(z[..., 0], loc[:, 0], 0.5))


def test_data_that_read_a_number_masked_inside_its_event_are_refused(linear):
    lm, x, _, _ = linear
    some = EVENT.clone()
    some[1:4] = True
    for mask, read in ((EVENT, True), (EVENT, ~EVENT), (some, True)):
        bad = (~mask).any(-1).nonzero().flatten().tolist()
        with pytest.raises(MaskError, match=re.escape(f"'z' of data {bad}")):
            weigh(*event_masked(lm, mask, mask, lm.posterior(x).loc, read=read), x)


@pytest.mark.parametrize("seen", [True, False])
def test_blocks_of_numbers_masked_inside_an_event(seen):
    """As many blocks as data, so that an axis in the wrong place shows no other shape; two numbers in each."""
    x, mask = randn(3), torch.tensor([[True, False, True], [False, True, True], [True, True, True]])

    def blocks(loc, scale):
        return dist.MultivariateNormal(loc, scale_tril=scale * torch.eye(2, dtype=F64)).mask(mask).to_event(1)

    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", blocks(x.new_zeros(3, 3, 2), 1.0))
            kept = mask if seen else torch.ones_like(mask)
            pyro.sample("x", dist.Normal((z * kept[..., None]).sum((-1, -2)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", blocks(x[:, None, None].expand(3, 3, 2), 0.8))

    if not seen:
        with pytest.raises(MaskError, match=r"'z' of data \[0, 1\]"):
            weigh(model, guide, x)
        return
    result = weigh(model, guide, x)
    z = result.values["z"]
    log_ratio = torch.where(mask, (normal(z, 0.0, 1.0) - normal(z, x[:, None, None], 0.8)).sum(-1), ZERO).sum(-1)
    assert_close(result.log_weight, log_ratio + normal(x, (z * mask[..., None]).sum((-1, -2)), 1.0))
    truth = dist.Normal(ZERO, (1 + 2.0 * mask.sum(-1)).to(F64).sqrt()).log_prob(x)
    assert_close(ExactEvidence(model, guide)(x).log_evidence, truth)


@pytest.mark.parametrize("sides", [(EVENT, None), (None, EVENT), (EVENT, ~EVENT)])
def test_a_mask_inside_a_latent_event_on_one_side_is_refused(linear, sides):
    lm, x, _, _ = linear
    with pytest.raises(MaskError, match="'z' is masked inside its event"):
        weigh(*event_masked(lm, *sides, lm.posterior(x).loc), x)


@pytest.mark.parametrize("sides", [(ROWS, None), (None, ROWS), (ROWS, ROWS)])
def test_a_mask_that_is_constant_over_the_event_is_carried_over(linear, sides):
    lm, x, _, _ = linear
    loc = lm.posterior(x).loc
    model, guide = event_masked(lm, *sides, loc)
    result = weigh(poutine.mask(model, mask=PARTIAL), guide, x)
    z = result.values["z"]
    ratio = (normal(z, 0.0, 1.0) - normal(z, loc, 0.5)).sum(-1) + likelihood(lm, z).log_prob(x)
    assert_close(result.log_weight, torch.where(PARTIAL, ratio, ZERO))
    with pytest.raises(MaskError, match=r"'z' of data \[1, 4\]"):
        weigh(model, guide, x)


def test_a_mask_on_a_hierarchy():
    """The lower of two latents masked by the model alone."""
    x = randn(5)

    def model(x):
        with pyro.plate("data", 5):
            z2 = pyro.sample("z2", dist.Normal(ZERO, 1.0))
            with poutine.mask(mask=PARTIAL):
                z1 = pyro.sample("z1", dist.Normal(z2, 0.5))
                pyro.sample("x", dist.Normal(z1, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 5):
            z2 = pyro.sample("z2", dist.Normal(x, 0.8))
            pyro.sample("z1", dist.Normal(z2 + x, 0.9))

    result = weigh(model, guide, x)
    z1, z2 = result.values["z1"], result.values["z2"]
    masked = normal(z1, z2, 0.5) + normal(x, z1, 1.0) - normal(z1, z2 + x, 0.9)
    assert_close(result.log_weight, normal(z2, 0.0, 1.0) - normal(z2, x, 0.8) + torch.where(PARTIAL, masked, ZERO))


def test_a_mask_that_depends_on_the_particle():
    """A gate drawn by the guide masks a likelihood."""
    x = randn(5)

    def model(x):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            with poutine.mask(mask=z > 0):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Normal(ZERO, 1.0))

    result = weigh(model, guide, x, K=6)
    z = result.values["z"]
    assert_close(result.log_weight, torch.where(z > 0, normal(x, z, 1.0), ZERO))


@pytest.mark.parametrize("masked_side", ["model", "guide"])
def test_masks_under_an_autoguide(masked_side):
    """The draw of an AutoNormal, named differently, is masked with its latent."""
    x = randn(5)

    def plain(x):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Gamma(tensor(2.0), tensor(1.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    masked = poutine.mask(plain, mask=PARTIAL)
    auto = pyro.infer.autoguide.AutoNormal(masked if masked_side == "guide" else plain, init_scale=0.5)
    auto(x)
    result = weigh(masked, auto, x)
    assert_close(result.log_weight[:, ~PARTIAL], torch.zeros(4, 2, dtype=F64))
    z = result.values["z"]
    loc, scale = auto.locs.z.detach(), auto.scales.z.detach()
    log_q = normal(z.log(), loc, scale) - z.log()
    log_p = normal(x, z, 1.0) + z.log() - z
    assert_close(result.log_weight[:, PARTIAL], (log_p - log_q)[:, PARTIAL], atol=1e-6)


def test_masks_under_auto_diagonal_normal():
    x = randn(5)

    def plain(x):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Gamma(tensor(2.0), tensor(1.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    auto = pyro.infer.autoguide.AutoDiagonalNormal(plain, init_scale=0.5)
    auto(x)
    result = weigh(poutine.mask(plain, mask=PARTIAL), auto, x)
    assert_close(result.log_weight[:, ~PARTIAL], torch.zeros(4, 2, dtype=F64))


@pytest.mark.parametrize("side", ["model", "both"])
@pytest.mark.parametrize("with_continuous", [False, True])
def test_a_masked_datum_with_an_enumerated_site_has_evidence_zero(side, with_continuous):
    x = randn(5)
    p = tensor([0.2, 0.5, 0.3])

    def model(x):
        with pyro.plate("data", 5):
            k = pyro.sample("k", dist.Categorical(p))
            z = pyro.sample("z", dist.Normal(ZERO, 1.0)) if with_continuous else 0.0
            pyro.sample("x", dist.Normal(k.to(F64) + z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 5):
            pyro.sample("k", dist.Categorical(p.flip(0)), infer={"enumerate": "parallel"})
            if with_continuous:
                pyro.sample("z", dist.Normal(x, 0.5))

    masked_guide = poutine.mask(guide, mask=PARTIAL) if side == "both" else guide
    result = weigh(poutine.mask(model, mask=PARTIAL), masked_guide, x)
    zero = torch.zeros(4, 2, dtype=F64)
    assert_close(result.log_weight[:, ~PARTIAL], zero)
    assert_close(result.elbo[:, ~PARTIAL], zero)
    plain = weigh(model, guide, x)
    assert_close(result.log_weight[:, PARTIAL], plain.log_weight[:, PARTIAL])
    assert_close(result.elbo[:, PARTIAL], plain.elbo[:, PARTIAL])


def test_a_masked_datum_with_a_site_enumerated_in_the_model_has_evidence_zero():
    x = randn(5)
    p = tensor([0.2, 0.5, 0.3])

    def model(x):
        with pyro.plate("data", 5):
            k = pyro.sample("k", dist.Categorical(p), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(k.to(F64), 1.0), obs=x)

    result = weigh(poutine.mask(model, mask=PARTIAL), lambda x: None, x)
    table = torch.stack([p[k].log() + normal(x, float(k), 1.0) for k in range(3)]).logsumexp(0)
    assert_weights(result, torch.where(PARTIAL, table, ZERO))


def test_a_mask_is_seen_by_the_vectorised_execution(linear):
    """`cat` with an argument of B rows: no leading axis; the mask must still be read."""
    x, y = randn(5), randn(5, 2)
    weight = randn(3)

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(tensor([0.0]), 1.0).to_event(1))
            with poutine.mask(mask=PARTIAL):
                pyro.sample("x", dist.Normal(torch.cat([z, y], -1) @ weight, 0.5), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)), poutine.mask(mask=PARTIAL):
            pyro.sample("z", dist.Normal(x[:, None], 0.5).to_event(1))

    result = weigh(model, guide, x, y)
    assert result.executions[1] != "leading"
    z = result.values["z"][..., 0]
    log_p = normal(x, z * weight[0] + y @ weight[1:], 0.5)
    ratio = normal(z, 0.0, 1.0) - normal(z, x, 0.5)
    expected = torch.where(PARTIAL, log_p + ratio, ZERO)
    assert_close(result.log_weight, expected)


def masked_chain(read_masked):
    """z2 is masked for half of the data; x reads it there or does not."""
    seen = torch.arange(5) % 2 == 0

    def model(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros(len(x)), 1.0))
            with poutine.mask(mask=seen):
                z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
            used = z2 if read_masked else torch.where(seen, z2, z1)
            pyro.sample("x", dist.Normal(used, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x / 3, 0.8))
            with poutine.mask(mask=seen):
                pyro.sample("z2", dist.Normal((x + z1) / 2, 0.9))

    return model, guide, seen


def test_a_masked_latent_that_an_observation_reads_is_refused():
    """Its value would be the guide's whim: the number depended on the guide, with a tight error."""
    model, guide, _ = masked_chain(read_masked=True)
    with pytest.raises(MaskError, match=r"'z2' of data \[1, 3\]"):
        weigh(model, guide, torch.randn(5))


def test_a_masked_latent_that_nothing_reads_is_fine():
    model, guide, seen = masked_chain(read_masked=False)
    x = torch.randn(5)
    result = weigh(model, guide, x, K=7)
    z1, z2 = result.values["z1"], result.values["z2"]
    used = torch.where(seen, z2, z1)
    log_p = normal(z1, 0.0, 1.0) + torch.where(seen, normal(z2, z1, 1.0), 0.0) + normal(x, used, 1.0)
    log_q = normal(z1, x / 3, 0.8) + torch.where(seen, normal(z2, (x + z1) / 2, 0.9), 0.0)
    assert_close(result.log_weight, log_p - log_q, atol=1e-5)


# -------------------------------------------------------------------------------- discrete latents that are masked


def masked_discrete(family, enumerate_in, reads):
    """A latent masked for the second datum, which the observation reads or not."""
    fns = {
        "Bernoulli": lambda: dist.Bernoulli(torch.tensor([0.1, 0.1])),
        "Categorical": lambda: dist.Categorical(torch.tensor([0.9, 0.05, 0.05]).expand(2, 3)),
        "Poisson": lambda: dist.Poisson(torch.tensor([0.1, 0.1])),
        "event of Bernoullis": lambda: dist.Bernoulli(torch.full((2, 3), 0.01)).to_event(1),
        "event of Poissons": lambda: dist.Poisson(torch.full((2, 3), 0.01)).to_event(1),
    }
    mask = torch.tensor([True, False])
    infer = {"enumerate": "parallel"}

    def model(x):
        with pyro.plate("data", 2):
            with poutine.mask(mask=mask):
                s = pyro.sample("s", fns[family](), infer=infer if enumerate_in == "model" else {})
            with poutine.mask(mask=True if reads else mask):
                s = s[..., 1] if "event" in family else s
                pyro.sample("x", dist.Normal(2.0 * s, 1.0), obs=x)

    def guide(x):
        if enumerate_in != "model":
            with pyro.plate("data", 2):
                pyro.sample("s", fns[family](), infer=infer if enumerate_in == "guide" else {})

    return model, guide


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("enumerate_in", ["guide", "model", "nowhere"])
@pytest.mark.parametrize("family", ["Bernoulli", "Categorical", "Poisson", "event of Bernoullis", "event of Poissons"])
def test_a_masked_discrete_latent_that_others_read_is_refused_whatever_was_drawn(family, enumerate_in, seed):
    if family not in ("Bernoulli", "Categorical") and enumerate_in != "nowhere":
        pytest.skip("cannot be enumerated")
    x = torch.tensor([0.3, -0.5])
    with pytest.raises(MaskError, match=r"'s' of data \[1\]"):
        pv.ImportanceSampling(*masked_discrete(family, enumerate_in, reads=True), num_particles=10, seed=seed)(x)
    evidence = pv.ImportanceSampling(*masked_discrete(family, enumerate_in, reads=False), num_particles=10, seed=seed)(x)
    assert evidence.log_evidence[1] == 0


def test_a_large_density_hides_no_small_dependence_on_a_masked_latent():
    x = torch.tensor([0.3, -0.5])
    mask = torch.tensor([True, False])

    def model(x):
        with pyro.plate("data", 2):
            with poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("constant", torch.full((2,), -5e5))

    def guide(x):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))

    with pytest.raises(MaskError, match=r"'z' of data \[1\]"):
        pv.ImportanceSampling(model, guide, num_particles=10, seed=0)(x)


@pytest.mark.parametrize(
    "run",
    [
        lambda m, g, x: pv.ImportanceSampling(m, g, num_particles=10)(x),
        lambda m, g, x: pv.InferenceGaps(m, g)(x),
        lambda m, g, x: pv.ImportanceWeightedELBO(num_particles=2).loss(m, g, x),
        lambda m, g, x: pv.InclusiveKL(num_particles=2).loss(m, g, x),
    ],
)
def test_a_latent_that_a_summed_out_switch_masks_is_refused_and_the_remedy_works(run):
    """log q has no axis of what the model sums out. Enumerated in the guide: a sum over the switch, by quadrature."""
    x = torch.tensor([0.3, 1.5])
    parallel = {"enumerate": "parallel"}

    def model_with(infer):
        def model(x):
            with pyro.plate("data", 2):
                on = pyro.sample("on", dist.Bernoulli(torch.tensor(0.4)), infer=infer)
                with poutine.mask(mask=on.bool()):
                    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))
                pyro.sample("x", dist.Normal(torch.where(on.bool(), z, torch.zeros(())), 1.0), obs=x)

        return model

    def guide(x, infer=None):
        with pyro.plate("data", 2):
            if infer:
                pyro.sample("on", dist.Bernoulli(torch.tensor(0.5)).expand([2]), infer=infer)
            pyro.sample("z", dist.Normal(0.5 * x, 0.8))

    with pytest.raises(MaskError, match="enumerate 'on' in the guide"):
        run(model_with(parallel), guide, x)
    off, on = (dist.Normal(0.0, sd).log_prob(x) for sd in (1.0, 2**0.5))
    truth = torch.logaddexp(off + math.log(0.6), on + math.log(0.4))
    evidence = pv.ImportanceSampling(model_with({}), lambda x: guide(x, parallel), num_particles=2000, seed=0)(x)
    assert ((evidence.log_evidence - truth).abs() < 5 * evidence.std_error).all()
    assert (evidence.std_error < 0.02).all()


@pytest.mark.parametrize("seed", range(6))
def test_a_saturating_function_does_not_hide_that_it_reads_a_masked_latent(seed):
    """tanh(3 z) is nearly one for two draws of three, so that one other draw often changes nothing."""
    x = torch.tensor([0.3, -0.5])

    def model(x):
        with pyro.plate("data", 2):
            with poutine.mask(mask=torch.tensor([True, False])):
                z = pyro.sample("z", dist.Normal(torch.full((2,), 1.0), 1.0))
            pyro.sample("x", dist.Normal(torch.tanh(3 * z), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(torch.full((2,), 1.0), 1.0))

    with pytest.raises(MaskError, match=r"'z' of data \[1\]"):
        pv.ImportanceSampling(model, guide, num_particles=10, seed=seed)(x)


def test_a_narrow_guide_does_not_hide_that_a_masked_latent_is_read():
    """Where all draws of the guide are nearly the same, draws of the prior tell."""
    x = torch.tensor([0.3, -0.5])

    def model(x, read):
        with pyro.plate("data", 2):
            with poutine.mask(mask=torch.tensor([True, False])):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))
            pyro.sample("x", dist.Normal(z if read else torch.where(torch.tensor([True, False]), z, 0.0), 1.0), obs=x)

    def guide(x, read):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(torch.full((2,), 1.0), 1e-7))

    with pytest.raises(MaskError, match=r"'z' of data \[1\]"):
        pv.ImportanceSampling(model, guide, num_particles=10, seed=0)(x, True)
    with pytest.warns(UnreliableEvidenceWarning, match="floats are too coarse"):  # they are one float
        assert len(pv.ImportanceSampling(model, guide, num_particles=10, seed=0)(x, False)) == 2


def test_a_mask_between_two_to_events_is_one_of_whole_rows():
    """`.to_event(1).mask(m).to_event(1)`: the steps of a sequence; the same as a mask of each number."""
    x = torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(0))
    kept = torch.arange(4) < torch.tensor([1, 2, 3, 4, 2, 4]).unsqueeze(-1)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    def log_evidence(masked):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
                pyro.sample("x", masked(dist.Normal(z.reshape(z.shape + (1, 1)), 1.0).expand(z.shape + (4, 2))), obs=x)

        return ExactEvidence(model, guide, seed=0)(x).log_evidence

    by_row = log_evidence(lambda fn: fn.to_event(1).mask(kept).to_event(1))
    by_number = log_evidence(lambda fn: fn.mask(kept.unsqueeze(-1)).to_event(2))
    assert torch.allclose(by_row, by_number, atol=1e-5)
