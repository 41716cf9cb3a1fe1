"""Bad input gets a named error: what was expected, what came, what to do. The same from every estimator."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, exact_pair, guide_of, linear_gaussian, make_evidence, model_of, one_line, quiet

import pyro_vae as pv
from pyro_vae import errors

ESTIMATORS = {
    "importance": functools.partial(pv.ImportanceSampling, num_particles=20, seed=0),
    "adaptive": functools.partial(pv.AdaptiveImportanceSampling, num_particles=20, num_gradients=4, seed=0),
    "gaps": functools.partial(pv.InferenceGaps, num_particles=20, seed=0),
}


@pytest.fixture(params=sorted(ESTIMATORS))
def make(request):
    return ESTIMATORS[request.param]


def raises(error, *parts):
    """The message has all of these parts."""
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*{part})" for part in parts))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinite_data_are_named_by_row(make, value):
    lm, x = linear_gaussian(num_data=20)
    x[3, 1] = x[17, 0] = value
    with raises(errors.InvalidDataError, "site 'x'", r"data \[3, 17\]", "NaN or infinite", "remove those rows", "mask"):
        make(*exact_pair(lm))(x)


def test_many_bad_rows_are_counted(make):
    lm, x = linear_gaussian(num_data=20)
    x[5:] = math.nan
    with raises(errors.InvalidDataError, r"\[5, 6, 7, 8, 9, 10, 11, 12, 13, 14\] and 5 more"):
        make(*exact_pair(lm))(x)


def test_bad_data_are_found_in_later_calls_too(make):
    """The structure is known by then, the data are not."""
    lm, x = linear_gaussian()
    estimator = make(*exact_pair(lm))
    with quiet():
        estimator(x)
    broken = x.clone()
    broken[2] = math.nan
    with raises(errors.InvalidDataError, r"data \[2\]"):
        estimator(broken)
    with quiet():
        estimator(x)


def bernoulli_pair(**options):
    decoder = torch.linspace(-1, 1, 4).expand(2, 4)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ decoder, **options).to_event(1), obs=x)

    return model, guide_of(lambda x: dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))


@pytest.mark.parametrize("options", [{}, {"validate_args": False}])
def test_values_outside_the_support_are_named_by_row(make, options):
    x = torch.zeros(6, 4)
    x[1, 2], x[4, 0] = 0.25, 2.0
    with raises(
        errors.SupportError,
        "site 'x'",
        "outside the support",
        "[Bb]oolean",
        r"data \[1, 4\]",
        "smallest 0, largest 2",
        "no log p",
        "binarise",
        "check_support=False",
    ):
        make(*bernoulli_pair(**options))(x)


def test_check_support_false_lets_them_through_and_the_record_says_so(make):
    """Grey pixels under a Bernoulli, as in Pyro's own tutorial."""
    x = torch.full((6, 4), 0.25)
    with quiet():
        result = make(*bernoulli_pair(validate_args=False), check_support=False)(x)
    evidence = getattr(result, "evidence", result)
    assert evidence.support_checked is False
    assert "score (not log p(x): values outside the support)" in one_line(evidence)
    assert evidence.to_dict()["support_checked"] is False
    assert bool(evidence.log_evidence.isfinite().all())
    with quiet():
        checked = make(*bernoulli_pair())(x.round())
    assert getattr(checked, "evidence", checked).support_checked is True


def test_a_table_of_gaps_on_scores_says_so():
    """The page of the gaps must not call a score log p(x)."""
    x = torch.full((6, 4), 0.25)
    with quiet():
        gaps = ESTIMATORS["gaps"](*bernoulli_pair(validate_args=False), check_support=False)(x)
    assert "support" in one_line(gaps)


@pytest.mark.parametrize("likelihood", ["gamma", "poisson", "beta"])
def test_other_supports(make, likelihood):
    fns = {
        "gamma": (lambda z: dist.Gamma(z.exp(), 1.0), -1.0),
        "poisson": (lambda z: dist.Poisson(z.exp()), 0.5),
        "beta": (lambda z: dist.Beta(z.exp(), 1.0), 1.5),
    }
    fn, bad = fns[likelihood]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", fn(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    x = torch.full((3,), 1.0 if likelihood != "beta" else 0.5)
    x[2] = bad
    with raises(errors.SupportError, r"data \[2\]"):
        make(model, guide)(x)


def test_an_empty_batch_is_named(make):
    lm, x = linear_gaussian()
    with raises(errors.EmptyBatchError, "batch is empty", "at least one datum"):
        make(*exact_pair(lm))(x[:0])


def test_an_empty_batch_in_an_unsized_plate(make):
    lm, x = linear_gaussian()

    def plate(x):
        return pyro.plate("data")

    family = guide_of(lambda x: dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1), plate)
    with raises(errors.EmptyBatchError, "at least one datum"):
        make(model_of(lm, plate), family)(x[:0])


def test_a_guide_that_misses_an_argument(make):
    lm, x = linear_gaussian()
    model, guide = exact_pair(lm)

    def conditional(x, y):
        model(x)

    with raises(
        errors.ArgumentError,
        r"the guide takes \(x\)",
        "2 positional",
        "model and guide must accept the same arguments",
    ):
        make(conditional, guide)(x, x)
    with raises(errors.ArgumentError, r"the model takes \(x, y\)", "1 positional", "missing a required argument: 'y'"):
        make(conditional, guide)(x)
    with raises(errors.ArgumentError, r"the model takes \(x\)", r"\['z'\] keyword"):
        make(model, guide)(x, z=1)


class Module(torch.nn.Module):
    def forward(self, x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))


def test_a_module_that_misses_an_argument(make):
    lm, x = linear_gaussian()
    with raises(errors.ArgumentError, r"the guide takes \(x, y\)", "1 positional"):
        make(model_of(lm), Module())(x)


@pytest.mark.parametrize("thing", [None, 3, "model", torch.zeros(2)])
def test_programs_must_be_callable(make, thing):
    lm, _ = linear_gaussian()
    model, guide = exact_pair(lm)
    with raises(errors.ArgumentError, "model must be callable", type(thing).__name__):
        make(thing, guide)
    with raises(errors.ArgumentError, "guide must be callable", type(thing).__name__):
        make(model, thing)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, None, "7", math.nan])
def test_num_particles_is_a_positive_whole_number(make, value):
    lm, _ = linear_gaussian()
    with raises(errors.OptionError, "num_particles must be a whole number of at least [12]", "got"):
        make(*exact_pair(lm), num_particles=value)


def test_options_are_keyword_only(make):
    lm, _ = linear_gaussian()
    with pytest.raises(TypeError):
        make.func(*exact_pair(lm), 100)


def test_an_unknown_plate_is_named(make):
    lm, x = linear_gaussian()
    with pytest.raises(errors.StructureError, match="nonsense"):
        make(*exact_pair(lm), datum_plate="nonsense")(x)


def test_unknown_prior_sites_are_named(make):
    lm, x = linear_gaussian()
    with raises(errors.OptionError, "prior_sites", "'nonsense'"):
        make(*exact_pair(lm), prior_sites=["nonsense"])(x)


def test_a_model_that_fails_raises_its_own_error(make):
    lm, x = linear_gaussian()

    def model(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        make(model, exact_pair(lm)[1])(x)
    assert torch.distributions.Distribution._validate_args is True


def test_every_error_is_a_value_or_runtime_error():
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, (ValueError, RuntimeError, UserWarning)), name
        assert kind.__doc__


def test_a_failed_call_leaves_nothing_behind(make):
    lm, x = linear_gaussian()
    pyro.param("mine", torch.tensor(1.0))
    state = torch.get_rng_state()
    with pytest.raises(errors.InvalidDataError):
        make(*exact_pair(lm))(x * math.nan)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(pyro.get_param_store().keys()) == ["mine"]


def test_joining_nothing_and_joining_strangers():
    with raises(ValueError, "at least one record"):
        pv.Evidence.cat([])
    with raises(ValueError, "differ in num_particles", "one estimator"):
        pv.Evidence.cat([make_evidence([-1.0], num_particles=10), make_evidence([-1.0], num_particles=20)])


def test_a_float64_pair_stays_float64_and_float32_data_are_no_surprise(make):
    lm, x = linear_gaussian()
    with quiet():
        result = make(*exact_pair(lm))(x)
    assert result.log_evidence.dtype == F64


# --- errors of the user's own program ---


class Network(torch.nn.Module):
    """A guide with parameters in single precision, and the model beside it."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 2)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x[:, :1].float())

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), 1.0).to_event(1))


@pytest.mark.parametrize("kind", [torch.double, torch.long])
def test_data_of_another_kind_than_the_parameters(kind):
    """The remedy of the message works."""
    pair, x = Network(), torch.ones(4, 3).to(kind)
    with pytest.raises(errors.ProgramError, match=r"the guide fails on its arguments .*Its parameters are float32.*x\.to"):
        pv.ImportanceSampling(pair.model, pair.guide, num_particles=10, seed=0)(x)
    pv.ImportanceSampling(pair.model, pair.guide, num_particles=10, seed=0)(x.to(torch.float32))


def test_data_of_another_shape():
    pair = Network()
    with pytest.raises(errors.ProgramError, match=r"1: float32 \(4, 5\).*RuntimeError: mat1"):
        pv.ImportanceSampling(pair.model, pair.guide, num_particles=10, seed=0)(torch.ones(4, 5))
    with pytest.raises(errors.ProgramError, match="the model fails"):
        pv.ImportanceSampling(lambda x: x @ torch.ones(7), pair.guide, num_particles=10)(torch.ones(4, 3))


def test_a_module_in_the_place_of_its_method():
    pair = Network()
    with pytest.raises(
        errors.ArgumentError, match=r"the model is a Network, a module that cannot be called.*\.model or \.guide"
    ):
        pv.ImportanceSampling(pair, pair.guide)
    with pytest.raises(errors.ArgumentError, match="write its forward"):
        pv.ImportanceSampling(torch.nn.Module(), pair.guide)


def test_an_event_that_counts_the_plate_of_the_data():
    """Two of twelve programs that people wrote had it. The remedy of the message works."""

    def pair(dims):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(dims))
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(dims))

        return model, guide

    with pytest.raises(errors.StructureError, match=r"'z' has the shape \(4, 2\).*write \.to_event\(1\)"):
        pv.ImportanceSampling(*pair(2), num_particles=10)(torch.ones(4))
    pv.ImportanceSampling(*pair(1), num_particles=10, seed=0)(torch.ones(4))


def test_plates_of_two_sizes():
    pair = Network()

    def ten(x):
        with pyro.plate("data", 10):
            pyro.sample("z", dist.Normal(torch.zeros(10, 2), 1.0).to_event(1))

    with pytest.raises(errors.DatumPlateError, match=r"sizes \[4, 10\].*pyro\.plate\('data', len\(x\)\)"):
        pv.ImportanceSampling(pair.model, ten, num_particles=10)(torch.ones(4, 3))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
        MemoryError("Unable to allocate 7.11 PiB"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
    ids=["torch", "numpy", "accelerator"],
)
def test_where_the_memory_is_at_its_end_the_error_says_what_takes_it(error):
    """An error of torch itself for who catches those, to halve a batch."""

    def model(x):
        raise error

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    runs = [
        lambda: pv.ImportanceSampling(model, guide, num_particles=4)(torch.zeros(3)),
        lambda: pv.BetaTrace_ELBO().loss(model, guide, torch.zeros(3)),
    ]
    for run in runs:
        with pytest.raises(
            errors.OutOfMemoryError, match="the memory does not hold this call .* pass smaller batches"
        ) as caught:
            run()
        assert isinstance(caught.value, torch.OutOfMemoryError)
