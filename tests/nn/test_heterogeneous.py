"""Rows of a table: the density is the sum over columns, data are refused by column, and single columns can be missing."""

import copy
import itertools
import pickle

import pyro
import pytest
import torch
from nn_helpers import F64, raw_numbers
from pair_helpers import quiet
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import pyro_vae as pv
import pyro_vae.nn as nn
from pyro_vae.densities import innermost, is_discrete
from pyro_vae.errors import ArgumentError, InvalidDataError, OptionError, SupportError

KINDS = {
    "numbers": (lambda: nn.Normal(), 2),
    "outliers": (lambda: nn.StudentT(5.0, "learned"), 1),
    "yes or no": (lambda: nn.Bernoulli(), 1),
    "classes": (lambda: nn.Categorical(4), 2),
    "counts": (lambda: nn.NegativeBinomial("learned"), 1),
    "levels": (lambda: nn.DiscretizedLogistic(8), 1),
    "durations": (lambda: nn.LogNormal(0.5), 1),
}
WIDTHS = [width for _, width in KINDS.values()]  # columns 0-1, 2, 3, 4-5, 6, 7, 8
X = sum(WIDTHS)


def table_head(dtype=F64):
    return nn.Heterogeneous([make() for make, _ in KINDS.values()], widths=WIDTHS).to(dtype)


def table(head, num_rows=20, seed=0, dtype=F64):
    torch.manual_seed(seed)
    return head(raw_numbers(head, seed, size=X, batch=(num_rows,), dtype=dtype)).sample()


def test_log_p_is_the_sum_over_the_columns():
    head = table_head()
    raw = raw_numbers(head, size=X, batch=(3, 5))
    fn = head(raw)
    assert (fn.batch_shape, fn.event_shape, raw.shape[-1]) == ((3, 5), (X,), head.num_outputs(X))
    x = fn.sample()
    expected, start, column = torch.zeros(3, 5, dtype=F64), 0, 0
    for (make, width), trained in zip(KINDS.values(), head.heads, strict=True):
        part, size = make().to(F64), trained.num_outputs(width)
        part.load_state_dict(trained.state_dict())
        expected += part(raw[..., start : start + size]).log_prob(x[..., column : column + width])
        start, column = start + size, column + width
    torch.testing.assert_close(fn.log_prob(x), expected)
    torch.testing.assert_close(fn.log_prob(x[0]), torch.stack([head(r).log_prob(x[0]) for r in raw]))


def test_it_sums_and_integrates_to_one():
    """Over a class, a bit and a number, by the trapezoid rule on the latter."""
    head = nn.Heterogeneous([nn.Categorical(3), nn.Normal(), nn.Bernoulli()])
    fn = head(raw_numbers(head, size=3))
    line = torch.linspace(-30, 30, 6001, dtype=F64)
    rows = torch.stack(torch.meshgrid(torch.arange(3.0).to(F64), line, torch.arange(2.0).to(F64), indexing="ij"), -1)
    assert float(fn.log_prob(rows).exp().sum()) / 100 == pytest.approx(1, abs=1e-10)


def test_draws_have_the_moments_of_their_columns():
    """Means of 20,000 draws of 7 columns within 4.5 errors, and 2 of a class: false alarm 9 * 7e-6."""
    head = table_head()
    torch.manual_seed(1)
    fn = head(raw_numbers(head, size=X))
    draws = fn.sample((20_000,))
    assert draws.dtype == F64
    error = draws.std(0) / 20_000**0.5
    known = ~fn.mean.isnan()
    assert known.tolist() == [True] * 4 + [False] * 2 + [True] * 3
    assert bool(((draws.mean(0) - fn.mean).abs() < 4.5 * error)[known].all())
    torch.testing.assert_close(draws.var(0)[known], fn.variance[known].detach(), rtol=0.25, atol=0)
    for column in (4, 5):
        share = (draws[:, column] == 2).to(F64).mean()
        p = fn.base_dist.fns[3].probs[column - 4, 2]
        assert abs(float(share - p)) < 4.5 * float(p * (1 - p) / 20_000) ** 0.5


def test_copies_types_expansion_and_vmap():
    head = table_head(torch.float32)
    raw = raw_numbers(head, size=X, batch=(4,), dtype=torch.float32)
    fn = head(raw)
    x = fn.sample()
    assert x.dtype == fn.log_prob(x).dtype == torch.float32
    wide = fn.expand((3, 4))
    assert type(wide) is type(fn)
    assert wide.sample().shape == (3, 4, X)
    torch.testing.assert_close(wide.log_prob(x), fn.log_prob(x).expand(3, 4))
    with torch.no_grad():
        head.heads[4].theta.log_value.add_(1)
    loaded = table_head(torch.float32)
    loaded.load_state_dict(head.state_dict())
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), loaded):
        torch.testing.assert_close(twin(raw).log_prob(x), head(raw).log_prob(x), rtol=0, atol=0)
    raw = raw_numbers(head, size=X, batch=(3, 4), dtype=torch.float32)
    expected = head(raw).log_prob(x)
    with pyro.validation_enabled(False):
        torch.testing.assert_close(torch.vmap(lambda r: head(r).log_prob(x))(raw), expected)


def test_encoders_see_each_column_as_its_head_has_it():
    head = nn.Heterogeneous([nn.Normal(), nn.Categorical(3), nn.Poisson(), nn.Binomial(4)], widths=(1, 2, 1, 1))
    x = torch.tensor([[-0.5, 2.0, 0.0, 9.0, 1.0]])
    seen = head.input_layer()(x)
    expected = torch.tensor([[-0.5, 0, 1, 0, 0, 1, 0, torch.tensor(10.0).log(), 0.25]])  # class by class
    torch.testing.assert_close(seen, expected)
    assert head.input_layer().double()(x.double()).dtype == F64


# --- what has no density ---

BAD = {0: torch.nan, 1: torch.inf, 2: torch.nan, 3: 0.5, 4: 4.0, 5: -1.0, 6: 1.5, 7: 8.0, 8: 0.0}
NAMES = {
    0: r"Normal \(columns 0 to 1\)",
    1: r"Normal \(columns 0 to 1\)",
    2: r"StudentT \(column 2\)",
    3: r"Bernoulli \(column 3\)",
    4: r"Categorical \(columns 4 to 5\)",
    5: r"Categorical \(columns 4 to 5\)",
    6: r"NegativeBinomial \(column 6\)",
    7: r"DiscretizedLogistic \(column 7\)",
    8: r"LogNormal \(column 8\)",
}


@pytest.mark.parametrize("column", BAD)
def test_data_outside_the_support_are_refused_by_column_and_row(column):
    head = table_head(torch.float32)
    x = table(head, dtype=torch.float32)
    fn = head(raw_numbers(head, size=X, batch=(20,), dtype=torch.float32))
    fn.log_prob(x)
    x[3, column] = x[8, column] = BAD[column]
    for one in (fn, fn.expand((2, 20))):
        with pytest.raises(
            SupportError, match=rf"the {NAMES[column]} head takes .*2 of \d+ values are not in rows \[3, 8\]"
        ):
            one.log_prob(x)
    with pyro.validation_enabled(False):
        assert fn.log_prob(x).shape == (20,)
    model, guide = pair_of(head)
    with pytest.raises((InvalidDataError, SupportError), match=r"'obs'.*in data \[3, 8\]"):
        pv.ImportanceSampling(model, guide, num_particles=3, seed=0)(x)


@pytest.mark.parametrize("validation", [True, False])
def test_rows_of_another_width_are_refused_always(validation):
    head = table_head()
    fn = head(raw_numbers(head, size=X, batch=(5,)))
    with pyro.validation_enabled(validation):
        for shape in ((5, 1), (5, X + 1), (5,)):
            with pytest.raises(SupportError, match=rf"Heterogeneous head gives events of shape \({X},\)"):
                fn.log_prob(torch.zeros(shape, dtype=F64))


def test_the_kernel_sees_through():
    head = table_head()
    fn = head(raw_numbers(head, size=X))
    assert isinstance(fn, torch.distributions.Independent)
    assert type(innermost(fn)).__name__ == "Columns"
    assert fn.support.event_dim == 1
    assert repr(fn.support) == repr(head.support)
    assert not is_discrete(fn)
    counts = nn.Heterogeneous([nn.Poisson(), nn.Bernoulli()])
    assert is_discrete(counts(torch.zeros(2)))
    rows = table(head)
    assert bool(head.support.check(rows).all())
    rows[4, 3] = 0.5
    assert head.support.check(rows).tolist() == [row != 4 for row in range(20)]


def test_options_that_do_not_fit_are_named():
    for make, message in (
        (lambda: nn.Heterogeneous([]), "expected heads, and one width for each, got 0 heads"),
        (lambda: nn.Heterogeneous([nn.Normal()], widths=(1, 2)), "got 1 heads and 2 widths"),
        (lambda: nn.Heterogeneous([nn.Normal()], widths=(0,)), "each number of widths must be a whole number"),
        (lambda: nn.Heterogeneous([nn.Normal(), torch.nn.Linear(1, 1)]), "must be a head.*got Linear"),
        (lambda: nn.Heterogeneous([nn.Bernoulli]), "must be a head.*got type"),
        (lambda: nn.Heterogeneous([nn.Bernoulli(event_dim=3)]), "event_dim=1.*got Bernoulli with event_dim=3"),
        (lambda: nn.Heterogeneous([nn.MultivariateNormal()]), "MultivariateNormal has no separate density for each number"),
        (lambda: nn.Heterogeneous([nn.Normal("optimal")]), "Normal has no separate density for each number"),
        (lambda: nn.Heterogeneous([nn.Normal()]).num_outputs(3), "has 1 columns, but the data 3"),
    ):
        with pytest.raises(OptionError, match=message):
            make()
    with pytest.raises(ArgumentError, match=r"needs 3 numbers for 2 columns, but its network gives shape \(5, 4\)"):
        nn.Heterogeneous([nn.Normal(), nn.Bernoulli()])(torch.zeros(5, 4))
    with pytest.raises(ArgumentError, match=r"has 1 columns, but the data have shape \(1, 3\): pass a head for each"):
        pv.mlp_vae(3, 2, likelihood=nn.Heterogeneous([nn.Normal()]))


def test_gradients_are_finite_far_out():
    head = nn.Heterogeneous([nn.Categorical(2), nn.NegativeBinomial()])
    x = torch.tensor([1.0, 30.0])
    for signs in itertools.product((-50.0, 0.0, 50.0), repeat=4):
        raw = torch.tensor(signs, requires_grad=True)
        log_prob = head(raw).log_prob(x)
        (gradient,) = torch.autograd.grad(log_prob, raw)
        assert bool(log_prob.isfinite()) and bool(gradient.square().isfinite().all())


# --- in programs ---


def pair_of(head, see=lambda x: x):
    """A latent per row; log p(x given z) through a linear map; the guide is the prior."""
    prior = nn.StandardNormal(1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, head.num_outputs(X), generator=generator)

    def model(x, seen=None):
        with pyro.plate("data", len(x)):
            fn = head(pyro.sample("latent", prior()) @ weight)
            pyro.sample("obs", fn if seen is None else fn.base_dist.mask(seen).to_event(1), obs=x)

    def guide(x, seen=None):
        with pyro.plate("data", len(x)):
            pyro.sample("latent", prior())

    return model, guide


def test_single_columns_may_be_missing_whatever_stands_in_the_hole():
    """log p(o) is that of a table without the column, summed by quadrature over the latent: within 1e-4 of 4.5 errors."""
    head = table_head(torch.float32)
    x = table(head, num_rows=X, dtype=torch.float32)
    seen = ~torch.eye(X, dtype=torch.bool)
    model, guide = pair_of(head)
    z = torch.linspace(-8, 8, 2001, dtype=F64).reshape(-1, 1, 1)
    weight = torch.randn(1, head.num_outputs(X), generator=torch.Generator().manual_seed(0))
    per_column = copy.deepcopy(head).double()(z @ weight.double()).base_dist.log_prob(x.double())
    log_joint = torch.where(seen, per_column, 0.0).sum(-1) + torch.distributions.Normal(0, 1).log_prob(z.squeeze(-1))
    truth = (log_joint.logsumexp(0) + torch.tensor(16 / 2000).log()).detach()
    for filling in (torch.nan, -3.5, 1e6):
        holes = torch.where(seen, x, filling)
        with quiet():
            evidence = pv.AdaptiveImportanceSampling(model, guide, num_particles=1000, seed=0)(holes, seen)
        assert bool(((evidence.log_evidence - truth).abs() < 4.5 * evidence.std_error + 1e-4).all())
        assert float(evidence.std_error.max()) < 0.1, "blunt"


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_vae_of_tables_trains_and_has_gaps(compiled):
    head = table_head(torch.float32)
    torch.manual_seed(0)
    z = torch.randn(200, 2)
    x = head(2 * z @ torch.randn(2, head.num_outputs(X))).sample()
    vae = pv.mlp_vae(X, 2, likelihood=table_head(torch.float32), hidden=(16,))
    assert vae.encode(x).event_shape == (2,)
    loss = pv.BetaTraceMeanField_ELBO(compile=True) if compiled else Trace_ELBO()
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.02}), loss)
    losses = torch.tensor([svi.step(x) for _ in range(20 if compiled else 150)])
    assert bool(losses.isfinite().all())
    assert losses[-5:].mean() < losses[:5].mean()
    if not compiled:
        vae.eval()
        with quiet():
            gaps = pv.InferenceGaps(vae.model, vae.guide, num_particles=50, seed=0)(x[:5])
        assert bool(gaps.inference.isfinite().all())
        assert vae.generate(7).shape == vae.reconstruct(x[:7]).shape == (7, X)
