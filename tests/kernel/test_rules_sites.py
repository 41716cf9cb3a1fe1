"""DESIGN 5.2 and 5.3: scales are stripped, and every site has a counterpart or a reason."""

import contextlib
import functools

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
    posterior,
    randn,
    standard_normal,
    tensor,
    weigh,
)
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import (
    ArgumentError,
    AuxiliarySiteError,
    DatumPlateError,
    ObservedInGuideError,
    OptionError,
    SiteMismatchError,
    StructureError,
)

ZERO = tensor(0.0)


@pytest.fixture
def linear():
    lm, x = linear_gaussian()
    return (lm, x, *exact_pair(lm))


# --- scales ---


def test_a_scale_around_the_whole_model_is_stripped_and_listed(linear):
    lm, x, model, guide = linear
    result = weigh(poutine.scale(model, scale=0.25), guide, x)
    assert_weights(result, lm.log_evidence(x))
    assert result.structure.stripped_scales == {"z": 0.25, "x": 0.25}


def test_a_scale_around_the_whole_guide_is_stripped_and_listed(linear):
    lm, x, model, guide = linear
    result = weigh(model, poutine.scale(guide, scale=3.0), x)
    assert_weights(result, lm.log_evidence(x))
    assert result.structure.stripped_scales == {"z": 3.0}


def test_scales_on_both_sides_are_stripped_and_listed(linear):
    lm, x, model, guide = linear
    result = weigh(poutine.scale(model, scale=0.5), poutine.scale(guide, scale=0.5), x)
    assert_weights(result, lm.log_evidence(x))
    assert result.structure.stripped_scales == {"z": 0.5, "x": 0.5}


@pytest.mark.parametrize("as_tensor", [False, True])
def test_kl_annealing_by_a_scale_on_the_latent_is_stripped_and_listed(linear, as_tensor):
    lm, x, _, _ = linear
    beta = tensor(0.1) if as_tensor else 0.1

    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=beta):
                z = pyro.sample("z", standard_normal(lm))
            pyro.sample("x", likelihood(lm, z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=beta):
            pyro.sample("z", posterior(lm, x))

    result = weigh(model, guide, x)
    assert_weights(result, lm.log_evidence(x))
    assert result.structure.stripped_scales == pytest.approx({"z": 0.1})


def test_a_scale_per_datum_is_stripped_or_refused_by_name(linear):
    lm, x, model, guide = linear
    scale = torch.linspace(0.5, 2.0, len(x), dtype=F64)
    try:
        result = weigh(poutine.scale(model, scale=scale), guide, x)
    except StructureError as error:
        assert "scale" in str(error)
        return
    assert_weights(result, lm.log_evidence(x))
    assert set(result.structure.stripped_scales) == {"z", "x"}


def test_without_scales_nothing_is_listed(linear):
    _, x, model, guide = linear
    assert weigh(model, guide, x).structure.stripped_scales == {}


# --- sites must match ---


def with_extra_latent(lm, name="u"):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard_normal(lm))
            u = pyro.sample(name, dist.Normal(ZERO, 1.0))
            pyro.sample("x", likelihood(lm, z), obs=x)
            pyro.sample("y", dist.Normal(u, 2.0), obs=x[:, 0])

    return model


def test_a_latent_that_the_guide_lacks_is_refused(linear):
    lm, x, _, guide = linear
    with pytest.raises(SiteMismatchError, match=r"'u' has no counterpart.*prior_sites=\['u'\]"):
        weigh(with_extra_latent(lm), guide, x)


def test_a_mistyped_latent_gets_a_hint(linear):
    lm, x, _, _ = linear

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z_latent", standard_normal(lm))
            pyro.sample("x", likelihood(lm, z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z_latnet", posterior(lm, x))

    with pytest.raises(SiteMismatchError, match="Did you mean the guide's 'z_latnet'"):
        weigh(model, guide, x)


@pytest.mark.parametrize("num_particles", [1, 4, 5])
def test_prior_sites_are_drawn_from_the_prior_and_carry_no_weight(linear, num_particles):
    lm, x, _, guide = linear
    result = weigh(with_extra_latent(lm), guide, x, prior_sites=["u"], K=num_particles)
    u = result.model["u"].value
    assert u.shape == (num_particles, 5)
    assert len(u.unique()) == u.numel()
    assert set(result.lw.log_prior_by_site) == {"z"}
    assert_close(result.log_weight, lm.log_evidence(x) + normal(x[:, 0], u, 2.0))
    assert result.structure.prior_sites == ("u",)


def test_a_prior_site_under_an_execution_other_than_the_leading_axis():
    """`cat` with an argument of B rows rules out the leading axis; the prior is drawn per particle."""
    x, y = randn(5), randn(5, 2)
    weight = randn(3)

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(tensor([0.0]), 1.0).to_event(1))
            u = pyro.sample("u", dist.Normal(ZERO, 1.0))
            pyro.sample("x", dist.Normal(torch.cat([z, y], -1) @ weight + u, 0.5), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, None], 0.5).to_event(1))

    result = weigh(model, guide, x, y, prior_sites=["u"], K=4)
    z, u = result.values["z"], result.model["u"].value
    assert u.shape == (4, 5)
    assert len(u.unique()) == 20
    mean = z[..., 0] * weight[0] + y @ weight[1:] + u
    log_prior = normal(z[..., 0], 0.0, 1.0)
    assert_close(result.log_weight, normal(x, mean, 0.5) + log_prior - normal(z[..., 0], x, 0.5))


def test_prior_sites_with_an_unknown_name(linear):
    _, x, model, guide = linear
    for name in ("nope", "x", "z"):
        with pytest.raises(OptionError, match=f"'{name}'"):
            weigh(model, guide, x, prior_sites=[name])


def test_a_guide_site_that_the_model_lacks_is_refused(linear):
    lm, x, model, _ = linear

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(ZERO, 1.0))
            p = posterior(lm, x)
            pyro.sample("z", dist.MultivariateNormal(p.loc + a[..., None], scale_tril=p.scale_tril))

    with pytest.raises(AuxiliarySiteError, match="'a' has no latent counterpart"):
        weigh(model, guide, x)


def test_a_guide_site_marked_auxiliary_is_refused_too(linear):
    """Anyone can set `is_auxiliary`: only Pyro's own autoguides are known to pair it with a Jacobian."""
    lm, x, model, _ = linear

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(a.sin(), event_dim=1))

    with pytest.raises(AuxiliarySiteError):
        weigh(model, guide, x)


def test_a_guide_site_with_the_name_of_an_observed_one_is_refused(linear):
    lm, x, model, guide = linear

    def both(x):
        guide(x)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))

    with pytest.raises(AuxiliarySiteError, match="'x'"):
        weigh(model, both, x)


def test_an_auxiliary_variable_is_right_when_the_model_has_it(linear):
    """q(a, z) against p(z, x) r(a | z): a valid weight, constant where r is q(a)."""
    lm, x, _, _ = linear

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard_normal(lm))
            pyro.sample("x", likelihood(lm, z), obs=x)
            pyro.sample("a", dist.Normal(ZERO, 1.5))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(ZERO, 1.5))
            pyro.sample("z", posterior(lm, x))

    assert_weights(weigh(model, guide, x), lm.log_evidence(x))


def test_a_delta_over_a_continuous_latent_is_refused(linear):
    lm, x, model, _ = linear

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(lm.posterior(x).loc, event_dim=1))

    with pytest.raises(AuxiliarySiteError, match="'z' is a Delta"):
        weigh(model, guide, x)


@pytest.mark.parametrize("how", ["mask", "to_event", "expand", "both"])
def test_a_delta_is_refused_however_it_is_wrapped(linear, how):
    lm, x, model, _ = linear

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = lm.posterior(x).loc
            fn = dist.Delta(loc).to_event(1) if how in ("to_event", "both") else dist.Delta(loc, event_dim=1)
            fn = fn.mask(torch.ones(5, dtype=torch.bool)) if how in ("mask", "both") else fn.expand((5,))
            pyro.sample("z", fn)

    with pytest.raises(AuxiliarySiteError, match="'z' is a Delta"):
        weigh(model, guide, x)


def test_a_delta_over_a_discrete_latent_has_probability_one():
    x = tensor([0.3, -1.0, 2.0])

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(tensor(0.3)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Delta((x > 0.5).to(F64)))

    k = (x > 0.5).to(F64)
    expected = normal(x, k, 1.0) + (0.3 * k + 0.7 * (1 - k)).log()
    assert_weights(weigh(model, guide, x), expected)


def test_event_shapes_that_differ_are_refused(linear):
    lm, x, model, _ = linear

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))

    with pytest.raises(SiteMismatchError, match=r"'z' differs in shape.*\(3,\).*\(2,\)"):
        weigh(model, guide, x)


def test_a_missing_to_event_is_refused(linear):
    lm, x, model, _ = linear

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(5, 2, dtype=F64), 1.0))

    with pytest.raises(StructureError):
        weigh(model, guide, x)


def test_two_sites_of_one_name_are_refused(linear):
    lm, x, model, _ = linear

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(lm, x))
            pyro.sample("z", posterior(lm, x))

    with pytest.raises(StructureError, match="two sample statements are named 'z'"):
        weigh(model, guide, x)


def test_a_latent_with_a_value_from_a_handler_inside_is_refused(linear):
    lm, x, model, guide = linear
    fixed = poutine.trace(guide).get_trace(x)
    with pytest.raises(StructureError, match="'z' of the data already has a value"):
        weigh(poutine.replay(model, trace=fixed), guide, x)
    with pytest.raises(StructureError, match="'z' of the data already has a value"):
        weigh(model, poutine.replay(guide, trace=fixed), x)


# --- observed sites, factors and deterministic ones ---


def test_an_observed_site_in_the_guide_is_refused(linear):
    lm, x, model, _ = linear

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", posterior(lm, x))
            pyro.sample("side", dist.Normal(z[..., 0], 1.0), obs=x[:, 0])

    with pytest.raises(ObservedInGuideError, match="'side'"):
        weigh(model, guide, x)


def test_a_factor_in_the_guide_counts_as_log_q_with_has_rsample(linear):
    """z drawn by hand-made reparametrisation: Normal draw, doubled, with the Jacobian as a factor."""
    lm, x, model, _ = linear

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(lm, x))
            pyro.factor("jacobian", x[:, 0], has_rsample=True)

    result = weigh(model, guide, x)
    assert_weights(result, lm.log_evidence(x) - x[:, 0])
    assert_close(result.lw.log_guide_by_site["jacobian"].expand(4, 5), x[:, 0].expand(4, 5))


@pytest.mark.parametrize("has_rsample", [False])
def test_any_other_factor_in_the_guide_is_refused(linear, has_rsample):
    lm, x, model, _ = linear

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(lm, x))
            pyro.factor("f", x[:, 0], has_rsample=has_rsample)

    with pytest.raises(AuxiliarySiteError, match="factor 'f'"):
        weigh(model, guide, x)


def test_deterministic_sites_are_ignored_wherever_they_are(linear):
    lm, x, _, guide = linear

    def model(x):
        pyro.deterministic("outside", x.mean(0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard_normal(lm))
            pyro.deterministic("mean", z @ lm.weight.T, event_dim=1)
            pyro.deterministic("plain", z[..., 0])
            pyro.sample("x", likelihood(lm, z), obs=x)
        pyro.deterministic("after", z.sum())

    def chatty_guide(x):
        pyro.deterministic("encoding", x.sum())
        guide(x)

    assert_weights(weigh(model, chatty_guide, x), lm.log_evidence(x))


def test_a_factor_in_the_plate_counts_as_likelihood(linear):
    lm, x, _, guide = linear

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard_normal(lm))
            pyro.factor("x", likelihood(lm, z).log_prob(x))

    result = weigh(model, guide, x)
    assert_weights(result, lm.log_evidence(x))
    assert set(result.lw.log_likelihood_by_site) == {"x"}


@pytest.mark.parametrize("datum_plate", ["infer", "data"])
def test_a_factor_outside_the_plate_is_given(linear, datum_plate):
    lm, x, model, guide = linear

    def with_factor(x):
        model(x)
        pyro.factor("regulariser", tensor(-1.0))

    assert_weights(weigh(with_factor, guide, x, datum_plate=datum_plate), lm.log_evidence(x))

    def with_the_latents(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(lm.weight.shape[1], dtype=F64), 1.0).to_event(1))
            pyro.sample("x", likelihood(lm, z), obs=x)
        pyro.factor("regulariser", -z.square().sum())

    with pytest.raises(DatumPlateError, match="'regulariser' lies outside.*and depends on"):
        weigh(with_the_latents, guide, x, datum_plate=datum_plate)


def test_a_factor_outside_the_plate_counts_once_for_the_whole_call(linear):
    lm, x, model, guide = linear

    def with_factor(x):
        model(x)
        pyro.factor("regulariser", tensor(-1.0))

    assert_weights(weigh(with_factor, guide, x, datum_plate=None), (lm.log_evidence(x).sum() - 1).reshape(1))


@pytest.mark.parametrize("datum_plate", ["infer", "data"])
def test_an_observed_site_outside_the_plate_is_given(linear, datum_plate):
    lm, x, model, guide = linear

    def outside(x):
        model(x)
        pyro.sample("t", dist.Normal(ZERO, 1.0), obs=tensor(0.5))

    result = weigh(outside, guide, x, datum_plate=datum_plate)
    assert_weights(result, lm.log_evidence(x))
    assert result.lw.structure.given == ("t",)


def test_a_model_without_observations_and_its_prior_as_guide():
    def program():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(torch.zeros(3, dtype=F64), 1.0))

    assert_weights(weigh(program, program), torch.zeros(3, dtype=F64))


def test_a_model_without_latents_and_an_empty_guide():
    x = randn(4)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(ZERO, 1.0), obs=x)

    assert_weights(weigh(model, lambda x: None, x), normal(x, 0.0, 1.0))


# --- how programs are written ---


class Encoder(nn.Module):
    def __init__(self, lm):
        super().__init__()
        eye = torch.eye(2, dtype=F64)
        precision = torch.linalg.inv(lm.weight.T @ lm.weight + lm.variance * eye)
        self.linear = nn.Linear(3, 2, dtype=F64)
        with torch.no_grad():
            self.linear.weight.copy_(precision @ lm.weight.T)
            self.linear.bias.copy_(-precision @ lm.weight.T @ lm.bias)
        self.scale_tril = torch.linalg.cholesky(precision * lm.variance)

    def forward(self, x):
        return dist.MultivariateNormal(self.linear(x), scale_tril=self.scale_tril)


class Decoder(nn.Module):
    def __init__(self, lm):
        super().__init__()
        self.linear = nn.Linear(2, 3, dtype=F64)
        self.scale = lm.variance.sqrt()
        with torch.no_grad():
            self.linear.weight.copy_(lm.weight)
            self.linear.bias.copy_(lm.bias)

    def forward(self, z):
        return dist.Normal(self.linear(z), self.scale).to_event(1)


class TutorialVAE(nn.Module):
    """As in Pyro's VAE tutorial: methods that register their networks with pyro.module."""

    def __init__(self, lm):
        super().__init__()
        self.encoder, self.decoder = Encoder(lm), Decoder(lm)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = torch.zeros((x.shape[0], 2), dtype=F64), torch.ones((x.shape[0], 2), dtype=F64)
            z = pyro.sample("latent", dist.Normal(loc, scale).to_event(1))
            pyro.sample("obs", self.decoder(z), obs=x.reshape(-1, 3))

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("latent", self.encoder(x))


def test_methods_of_a_module_as_in_the_tutorial(linear):
    lm, x, _, _ = linear
    vae = TutorialVAE(lm)
    assert_weights(weigh(vae.model, vae.guide, x), lm.log_evidence(x))


def test_functions_with_pyro_module(linear):
    lm, x, _, _ = linear
    encoder, decoder = Encoder(lm), Decoder(lm)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            pyro.sample("x", decoder(pyro.sample("z", standard_normal(lm))), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", encoder(x))

    assert_weights(weigh(model, guide, x), lm.log_evidence(x))


class Model(PyroModule):
    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        self.decoder = PyroModule[nn.Linear](2, 3, dtype=F64)
        with torch.no_grad():
            self.decoder.weight.copy_(lm.weight)
            self.decoder.bias.copy_(lm.bias)
        self.scale = PyroParam(lm.variance.sqrt(), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard_normal(self.lm))
            pyro.sample("x", dist.Normal(self.decoder(z), self.scale).to_event(1), obs=x)


class Guide(PyroModule):
    def __init__(self, lm, x):
        super().__init__()
        p = posterior(lm, x)
        self.loc = nn.Parameter(p.loc)
        self.tril = PyroParam(p.scale_tril, constraint=dist.constraints.lower_cholesky, event_dim=2)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(self.loc, scale_tril=self.tril))


def test_pyro_modules_with_parameters(linear):
    lm, x, _, _ = linear
    assert_weights(weigh(Model(lm), Guide(lm, x), x), lm.log_evidence(x))


def test_a_pyro_module_with_an_amortised_sample_statement(linear):
    lm, x, model, _ = linear

    class Sampled(PyroModule):
        def __init__(self):
            super().__init__()
            self.z = PyroSample(lambda self: posterior(lm, self.x))

        def forward(self, x):
            self.x = x
            with pyro.plate("data", len(x)):
                return self.z

    assert_weights(weigh(model, Sampled(), x), lm.log_evidence(x))


def test_functions_with_pyro_param(linear):
    lm, x, model, _ = linear
    p = posterior(lm, x)
    pyro.param("loc", p.loc)
    pyro.param("scale_tril", p.scale_tril, constraint=dist.constraints.lower_cholesky)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(5, 2, dtype=F64))
        scale_tril = pyro.param("scale_tril", torch.eye(2, dtype=F64).expand(5, 2, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))

    assert_weights(weigh(model, guide, x), lm.log_evidence(x))


def test_keyword_arguments_and_callables(linear):
    lm, x, model, guide = linear

    def shifted(x, *, shift, flag=True):
        model(x - shift if flag else x)

    def shifted_guide(x, shift, **kwargs):
        guide(x - shift if kwargs.get("flag", True) else x)

    for kwargs in ({"shift": 0.5}, {"shift": tensor(0.5), "flag": True}):
        assert_weights(weigh(shifted, shifted_guide, x, kwargs=kwargs), lm.log_evidence(x - 0.5))
    assert_weights(weigh(shifted, shifted_guide, x, kwargs={"shift": 0.5, "flag": False}), lm.log_evidence(x))
    for program in (functools.partial(guide), lambda x: guide(x), poutine.handlers.trace(guide)):
        assert_weights(weigh(model, program, x), lm.log_evidence(x))


def test_arguments_that_change_the_branch_are_not_confused(linear):
    lm, x, model, guide = linear
    from pyro_vae.kernel import Pair

    def switched(x, y=None):
        model(x if y is None else y)

    pair = Pair(switched, lambda x, y=None: guide(x if y is None else y))
    for y in (None, x + 1, None):
        expected = lm.log_evidence(x if y is None else y)
        assert_weights(weigh(None, None, x, y, pair=pair), expected)


def test_a_guide_that_lacks_an_argument(linear):
    _, x, model, guide = linear
    with pytest.raises(ArgumentError, match=r"the guide takes \(x\).*2 positional"):
        weigh(lambda x, y: model(x), lambda x: guide(x), x, x)


def test_a_model_that_lacks_a_keyword(linear):
    _, x, model, guide = linear
    with pytest.raises(ArgumentError, match=r"the model takes \(x\)"):
        weigh(lambda x: model(x), lambda x, y: guide(x), x, kwargs={"y": 1})


def test_programs_must_be_callable(linear):
    _, x, model, _ = linear
    with pytest.raises(ArgumentError, match="guide must be callable"):
        weigh(model, None, x)


def test_a_guide_with_a_transformed_distribution(linear):
    """A flow in the guide: log q by the change of variables."""
    lm, x, model, _ = linear
    flow = dist.transforms.AffineTransform(tensor([1.0, -1.0]), tensor([0.5, 2.0]), event_dim=1)

    def guide(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(lm.posterior(x).loc, 0.8).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    result = weigh(model, guide, x)
    z = result.values["z"]
    u = (z - flow.loc) / flow.scale
    log_guide = (normal(u, lm.posterior(x).loc, 0.8) - flow.scale.log()).sum(-1)
    assert_close(result.lw.log_guide, log_guide)


@pytest.fixture
def double():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["affine_autoregressive", "affine_coupling", "spline"])
def test_learned_flows_in_the_guide_agree_with_their_own_density(linear, name, double):
    lm, x, model, _ = linear
    flow = getattr(dist.transforms, name)(2)

    def guide(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    result = weigh(model, guide, x)
    z = result.values["z"]
    with torch.no_grad():
        u = flow._inverse(z)
        jacobian = flow.log_abs_det_jacobian(u, z)
        jacobian = jacobian.sum(-1) if jacobian.ndim == 3 else jacobian
    assert_close(result.lw.log_guide, normal(u, 0.0, 1.0).sum(-1) - jacobian, atol=1e-6)


# --- missing data by obs_mask ---


@pytest.mark.parametrize("num_particles", [1, 4, 5])
def test_obs_mask_gives_the_evidence_of_what_is_observed(num_particles):
    """Two observations per datum, some missing: log p of the others; the missing ones drawn."""
    num_data, s = 5, 0.7
    x = randn(num_data, 2)
    seen = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0], [1, 1]]).bool()

    def model(x, seen):
        with pyro.plate("data", num_data):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            for i in range(2):
                pyro.sample(f"x{i}", dist.Normal(z, s), obs=x[:, i], obs_mask=seen[:, i])

    def guide(x, seen):
        precision = 1 + seen.to(F64).sum(-1) / s**2
        loc = (x * seen).sum(-1) / s**2 / precision
        with pyro.plate("data", num_data):
            pyro.sample("z", dist.Normal(loc, precision**-0.5))

    expected = []
    for row, mask in zip(x, seen, strict=True):
        n = int(mask.sum())
        covariance = 1 + s**2 * torch.eye(n, dtype=F64)
        zero = torch.zeros(n, dtype=F64)
        expected.append(dist.MultivariateNormal(zero, covariance).log_prob(row[mask]) if n else ZERO)
    for data in (x, torch.where(seen, x, torch.nan)):
        result = weigh(model, lambda x, seen: guide(torch.nan_to_num(x), seen), data, seen, K=num_particles)
        assert_weights(result, torch.stack(expected))
        assert result.structure.prior_sites == ("x0_unobserved", "x1_unobserved")
        drawn = result.model["x0_unobserved"].value
        assert drawn.shape == (num_particles, num_data)
        assert len(drawn.unique()) == drawn.numel()


def test_obs_mask_with_an_imputed_value_that_is_used_further():
    """y depends on the imputed x: its draw keeps the evidence unbiased, not constant."""
    seen = torch.tensor([True, False, True])
    x, y = randn(3), randn(3)

    def model(x, y):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            filled = pyro.sample("x", dist.Normal(z, 0.5), obs=x, obs_mask=seen)
            pyro.sample("y", dist.Normal(filled, 2.0), obs=y)

    def guide(x, y):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(x, 0.9))

    result = weigh(model, guide, x, y, K=6)
    z, imputed = result.values["z"], result.model["x_unobserved"].value
    filled = torch.where(seen, x, imputed)
    expected = normal(z, 0.0, 1.0) - normal(z, x, 0.9) + normal(y, filled, 2.0)
    assert_close(result.log_weight, expected + torch.where(seen, normal(x, z, 0.5), ZERO))


def test_an_imputed_value_that_the_guide_does_provide_is_matched():
    seen = torch.tensor([True, False, True])
    x = randn(3)

    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=seen)

    def guide(x):
        with pyro.plate("data", 3):
            precision = 1 + seen.to(F64)
            z = pyro.sample("z", dist.Normal(seen * x / precision, precision**-0.5))
            with poutine.mask(mask=~seen):
                pyro.sample("x_unobserved", dist.Normal(z, 1.0))

    result = weigh(model, guide, x)
    assert_weights(result, torch.where(seen, normal(x, 0.0, 2**0.5), ZERO))
    assert result.structure.prior_sites == ()


def test_a_latent_delta_of_the_model_is_refused():
    """Its value would be its own whatever the guide draws, and log q would count against nothing."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            y = pyro.sample("y", dist.Delta(2 * z))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("y", dist.Normal(2 * z, 1.0))

    with pytest.raises(StructureError, match="'y' is a Delta.*pyro.deterministic"):
        weigh(model, guide, torch.randn(4))


# --- what a newcomer forgets ---


def test_data_that_are_not_observed_are_named():
    """The model lacks obs=, so its data are a latent that the guide lacks."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    with pytest.raises(SiteMismatchError, match="'x' .* observes nothing: if this site is the data, pass obs= to it"):
        pv.InferenceGaps(model, guide)(randn(4))


@pytest.mark.parametrize("plate", [None, "batch"])
def test_a_plate_on_one_side_alone_is_named(plate):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate(plate, len(x)) if plate else contextlib.nullcontext():
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    with pytest.raises(SiteMismatchError, match=r"in the model or in the guide alone .* in both, under the same name"):
        pv.InferenceGaps(model, guide)(randn(4))


def test_a_model_in_the_place_of_the_guide_is_named():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    with pytest.raises(ObservedInGuideError, match="Were model and guide passed in this order"):
        pv.InferenceGaps(guide, model)(randn(4))
