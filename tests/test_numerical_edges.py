"""Numbers at the edges of the floats: finite and right, named, or in doubt. Never a wrong one with a small error."""

import math
import warnings
from fractions import Fraction

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import quiet
from torch import nn

import pyro_vae as pv
from pyro_vae import errors, ops

F32, F64 = torch.float32, torch.float64
NAMED = tuple(getattr(errors, name) for name in errors.__all__ if not issubclass(getattr(errors, name), Warning))
INF = math.inf

# --- log-weights ---

COLUMNS = {
    "all -inf": [-INF] * 6,
    "one -inf": [-INF, 0.0, 0.0, 0.0, 0.0, 0.0],
    "one finite": [-INF] * 5 + [-3.0],
    "one dominant": [1e4, 0.0, 0.0, 0.0, 0.0, 0.0],
    "all -1e4": [-1e4] * 6,
    "from -1e4 to 1e4": [1e4, -1e4, 0.0, 5.0, -3.0, 2.0],
    "one +inf": [INF, 0.0, 0.0, 0.0, 0.0, 0.0],
    "two +inf": [INF, INF, 0.0, 0.0, 0.0, 0.0],
    "nan": [math.nan, 0.0, 0.0, 0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("dtype", [F64, F32, torch.float16, torch.bfloat16])
def test_the_gradient_of_a_log_mean_exp_is_never_nan(column, dtype):
    """The gradient is the share of a weight: softmax, and zero where the value is not finite."""
    x = torch.tensor(column, dtype=dtype, requires_grad=True)
    value = ops.log_mean_exp(x, 0)
    (gradient,) = torch.autograd.grad(value, x)
    truth = torch.tensor(column, dtype=F64).logsumexp(0) - math.log(6)
    eps = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(value.detach().double(), truth, rtol=eps, atol=eps, equal_nan=True)
    share = torch.tensor(column, dtype=F64).softmax(0) if math.isfinite(truth) else torch.zeros(6, dtype=F64)
    torch.testing.assert_close(gradient.double(), share, rtol=eps, atol=eps)


def test_the_error_of_a_log_mean_exp_does_not_depend_on_the_size_of_the_weights():
    """One weight of six has it all: its error is one. Beside 1e4 a rounded mean would say 1.0002 in float32."""
    for size in (0.0, 1e4, -1e4):
        x = torch.tensor([size] + [size - 200.0] * 5)
        torch.testing.assert_close(ops.log_mean_exp_std_error(x), torch.tensor(1.0), rtol=1e-6, atol=0.0)


OF_WEIGHTS = [
    lambda x: ops.log_mean_exp(x, 0),
    ops.effective_sample_size,
    ops.log_mean_exp_std_error,
    ops.jackknife_log_mean_exp,
    ops.fit_generalized_pareto,
    ops.pareto_smooth,
    ops.pareto_k,
]


@pytest.mark.parametrize("function", [*OF_WEIGHTS, lambda x: ops.index_code_information(x, 3)])
@pytest.mark.parametrize(
    "bad, error",
    [
        ([0.0, 1.0], TypeError),
        (torch.zeros(3).numpy(), TypeError),
        (None, TypeError),
        (torch.tensor([1, 2, 3]), TypeError),
        (torch.tensor([True, False]), TypeError),
        (torch.zeros(3, dtype=torch.complex64), TypeError),
        (torch.zeros(0), ValueError),
        (torch.tensor(1.0), ValueError),
    ],
    ids=["list", "numpy", "None", "int", "bool", "complex", "empty", "0-d"],
)
def test_what_are_no_log_weights(function, bad, error):
    with pytest.raises(error, match="expected|jackknife takes"):
        function(bad)


@pytest.mark.parametrize("function", OF_WEIGHTS[1:])
def test_half_precision_is_too_coarse_for_errors_and_tails(function):
    with pytest.raises(TypeError, match=r"got torch.bfloat16: pass x.float\(\)"):
        function(torch.zeros(200, dtype=torch.bfloat16))


# --- log p(x) in closed form: z ~ N(m, t^2), three x ~ N(w z + b, s^2) ---


def exact(x, m, t, w, s, b):
    """log p(x), (B,), in rational numbers but for the logarithms."""
    m, t, w, s, b = map(Fraction, (m, t, w, s, b))
    values = []
    for row in x.double().tolist():
        d = [Fraction(v) - w * m - b for v in row]
        noise, shared = s * s, (w * t) ** 2
        square = sum(v * v for v in d) / noise - shared * sum(d) ** 2 / (noise * (noise + 3 * shared))
        log_det = 2 * log_of(noise) + log_of(noise + 3 * shared)
        values.append(-1.5 * math.log(2 * math.pi) - 0.5 * log_det - 0.5 * float(square))
    return torch.tensor(values, dtype=F64)


def log_of(number):
    return math.log(number.numerator) - math.log(number.denominator)


def pair(m, t, w, s, b, dtype, factor):
    """Model, and guide with the posterior's mean and `factor` times its scale."""
    precision = 1 / Fraction(t) ** 2 + 3 * (Fraction(w) / Fraction(s)) ** 2
    gain = float(Fraction(w) / Fraction(s) ** 2 / precision)
    scale = factor * math.exp(-0.5 * log_of(precision))
    m_, t_, w_, s_, b_, gain_, scale_ = (torch.tensor(v, dtype=dtype) for v in (m, t, w, s, b, gain, scale))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m_, t_))
            mean = (w_ * z + b_).unsqueeze(-1)
            pyro.sample("x", dist.Normal(mean.expand(z.shape + (3,)), s_).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(m_ + gain_ * (x - (w_ * m_ + b_)).sum(-1), scale_))

    return model, guide


EDGES = {  # m, t, w, s, b
    "scale 1e-10": (0.0, 1.0, 1.0, 1e-10, 0.0),
    "variance 1e-30": (0.0, 1.0, 1.0, 1e-15, 0.0),
    "data of 1e-30": (0.0, 1e-30, 1.0, 1e-30, 0.0),
    "data of 1e30": (0.0, 1e30, 1.0, 1e30, 0.0),
    "latents at 1e6": (1e6, 1.0, 1.0, 0.5, -1e6),
    "latents at 1e9": (1e9, 1.0, 1.0, 0.5, -1e9),
    "a prior of scale 1e9": (0.0, 1e9, 1.0, 0.5, 0.0),
    "data at 1e9": (0.0, 1.0, 1.0, 0.5, 1e9),
}
ESTIMATORS = {
    "ImportanceSampling": lambda m, g: pv.ImportanceSampling(m, g, num_particles=200, seed=0),
    "AdaptiveImportanceSampling": lambda m, g: pv.AdaptiveImportanceSampling(m, g, num_particles=200, seed=0),
    "AnnealedImportanceSampling": lambda m, g: pv.AnnealedImportanceSampling(
        m, g, num_steps=10, num_chains=8, seed=0, progress=False
    ),
    "AutoEvidence": lambda m, g: pv.AutoEvidence(m, g, tolerance=0.1, max_cost=2000, seed=0),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("estimator, factor", [("ImportanceSampling", 1.0), *((estimator, 1.5) for estimator in ESTIMATORS)])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_log_p_is_right_or_named_or_in_doubt(estimator, edge, factor, dtype):
    """Off by more than five errors in one of 4 data of 80 cases: 2e-4 false alarms.

    At a scale below the distance between floats all draws of the guide are one number, all weights are equal, and log p(x)
    would be off by log(factor) with an error of zero.
    """
    m, t, w, s, b = EDGES[edge]
    generator = torch.Generator().manual_seed(1)
    z = m + t * torch.randn(4, 1, generator=generator, dtype=F64)
    x = (w * z + b + s * torch.randn(4, 3, generator=generator, dtype=F64)).to(dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record = ESTIMATORS[estimator](*pair(m, t, w, s, b, dtype, factor))(x)
    except NAMED:
        assert dtype == F32  # nothing here is too much for float64
        return
    truth = exact(x, m, t, w, s, b)
    off = (record.log_evidence.double() - truth).abs()
    allowed = 5 * record.std_error.double() + 0.02 + 3 * torch.finfo(dtype).eps * truth.abs()
    wrong = ~(off <= allowed) & record.reliable
    assert not bool(wrong.any()), (off, record.std_error, record.doubts)
    assert dtype == F32 or bool(record.reliable.all())


def test_draws_that_are_one_float_say_so():
    m, t, w, s, b = EDGES["scale 1e-10"]
    x = torch.tensor([[0.3, 0.3, 0.3]])
    precision = pytest.warns(errors.PrecisionWarning)
    with (
        precision,
        pytest.warns(errors.UnreliableEvidenceWarning, match="too coarse to distinguish latents from one another.*float64"),
    ):
        pv.ImportanceSampling(*pair(m, t, w, s, b, F32, 1.5), num_particles=200, seed=0, check=False)(x)


@pytest.mark.parametrize("num_particles", [10, 200])
def test_minus_infinity_is_in_doubt_for_any_number_of_weights(num_particles):
    """1e30 squared is beyond float32."""
    model, guide = pair(0.0, 1.0, 1.0, 0.5, 0.0, F32, 1.0)
    with quiet(), pytest.warns(errors.PrecisionWarning):
        record = pv.ImportanceSampling(model, guide, num_particles=num_particles, seed=0, check=False)(
            torch.full((2, 3), 1e30)
        )
    assert not bool(record.reliable.any())
    assert bool((record.log_evidence == -INF).all())


def test_a_log_p_of_no_weight_is_named_where_float64_agrees():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=F64), 1.0))
            pyro.factor("f", torch.full_like(z, -INF))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=F64), 1.0))

    with pytest.warns(errors.UnreliableEvidenceWarning, match="no draw of 3 of 3 data has a weight above 0"):
        record = pv.ImportanceSampling(model, guide, num_particles=10, seed=0)(torch.zeros(3, dtype=F64))
    assert bool(record.doubts["no weight"].all())


# --- objectives ---

FACTORS = {
    "some -inf": lambda z, w: torch.where(z > 0, w * z, torch.full_like(z, -INF)),
    "all -inf": lambda z, w: torch.full_like(z, -INF) + 0 * w,
    "one datum -inf": lambda z, w: torch.where(torch.arange(4) == 1, -INF, 0.0) + 0 * w * z,
    "1e4 nats": lambda z, w: 1e4 * torch.sin(50 * z) * w,
    "log of 0": lambda z, w: (w * z).clamp(min=0).log(),
}


class Factored(nn.Module):
    """z ~ N(0, 1), x ~ N(w z, .5^2), and a factor."""

    def __init__(self, factor):
        super().__init__()
        self.slope, self.log_scale, self.weight = (nn.Parameter(torch.tensor(v)) for v in (0.2, 0.1, 1.1))
        self.factor = factor

    def model(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.factor("f", self.factor(z, self.weight))
            pyro.sample("x", dist.Normal(self.weight * z, 0.5), obs=x)

    def guide(self, x):
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, self.log_scale.exp()))


OBJECTIVES = {
    **{
        f"importance-weighted, {gradient}": (lambda g=gradient: pv.ImportanceWeightedELBO(num_particles=8, gradient=g))
        for gradient in ("standard", "stl", "dreg")
    },
    "inclusive KL": lambda: pv.InclusiveKL(num_particles=8),
    "beta trace": lambda: pv.BetaTrace_ELBO(num_particles=2),
    "beta graph": lambda: pv.BetaTraceGraph_ELBO(num_particles=2),
    "beta mean field": lambda: pv.BetaTraceMeanField_ELBO(num_particles=2),
    "beta enumeration": lambda: pv.BetaTraceEnum_ELBO(
        num_particles=2, max_plate_nesting=1, strict_enumeration_warning=False
    ),
    "total correlation": lambda: pv.TotalCorrelationELBO(dataset_size=10),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("factor", FACTORS)
def test_gradients_where_weights_are_zero_or_far_apart(objective, factor):
    """Finite, and the same by both ways to ask for them, also where the loss is infinite."""
    gradients = []
    for form in ("loss_and_grads", "differentiable_loss"):
        pyro.clear_param_store()
        torch.manual_seed(0)
        program = Factored(FACTORS[factor])
        x = torch.tensor([0.3, -0.5, 1.2, 2.0])
        loss = getattr(OBJECTIVES[objective](), form)(program.model, program.guide, x)
        if isinstance(loss, torch.Tensor):
            loss.backward()
        assert not math.isnan(float(torch.as_tensor(loss).detach()))
        gradients.append([p.grad for p in program.parameters()])
    for by_step, by_loss in zip(*gradients, strict=True):
        by_step, by_loss = (torch.zeros(()) if g is None else g for g in (by_step, by_loss))
        assert bool(by_step.isfinite())
        torch.testing.assert_close(by_step, by_loss)
