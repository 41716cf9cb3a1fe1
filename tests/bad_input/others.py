"""What takes no pair: records, plots, networks, builders, exact sums, arithmetic, schedules, optimisers.

Each is a correct small call; one argument at a time is then replaced by every value of the wrong kind, shape or size.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.distributions.transforms import affine_autoregressive, conditional_affine_autoregressive
from torch import nn

import pyro_vae as pv

from .entrances import ENTRANCES, Linear, data
from .judge import Outcome, judged
from .table import good_result
from .values import VALUES

LEFT_OUT = {("path", "a string"): "a file in the folder of the tests"}


@dataclass(frozen=True)
class Other:
    """A correct small call: `call(**arguments())`. What it needs is made anew for each call."""

    name: str
    group: str
    call: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]
    also: tuple[str, ...] = ()  # arguments that are left at their default in the good call


class OtherCell(NamedTuple):
    other: Other
    argument: str
    row: str

    def __str__(self) -> str:
        return f"{self.other.name}, {self.argument}={self.row}"


@functools.cache
def record(name: str) -> Any:
    """What the correct call of an entrance returns."""
    return good_result(next(entrance for entrance in ENTRANCES if entrance.name == name))


def folder() -> Path:
    return Path(tempfile.mkdtemp())


def trained() -> pv.BetaTrace_ELBO:
    pyro.clear_param_store()
    pair, objective = Linear(), pv.BetaTrace_ELBO()
    objective.loss(pair.model, pair.guide, data())
    return objective


def watched() -> pv.Monitor:
    objective = pv.BetaTrace_ELBO()
    monitor = pv.Monitor(objective, progress=False)
    pair = Linear()
    for _ in monitor.watch([1, 2]):
        objective.loss(pair.model, pair.guide, data())
    return monitor


def early() -> pv.EarlyStopping:
    pyro.clear_param_store()
    pair = Linear()
    return pv.EarlyStopping(pair.model, pair.guide, [(data(),)], every=1, num_particles=2)


@functools.cache
def looked_at_samples() -> Any:
    """Of images of 4 x 4."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    vae, x = pv.mlp_vae(16, 2, likelihood=pv.nn.Normal(1.0), hidden=()), torch.randn(4, 16)
    check = pv.SampleCheck(vae.model, vae.guide, seed=0, image_shape=(4, 4))
    evidence = pv.ImportanceSampling(vae.model, vae.guide, num_particles=4, seed=0, check=False)(x)
    return check([(x,)], train=[(x,)], evidence=evidence, progress=False)


OF_SQUARES: dict[str, Callable[..., Any]] = {
    "manifold": lambda vae, x: pv.manifold(vae.model, vae.guide, x, num_steps=2, seed=0),
    "reconstruct": lambda vae, x: pv.reconstruct(vae.model, vae.guide, x, seed=0),
    "simulate": lambda vae, x: pv.simulate(vae.model, x, seed=0),
    "traverse": lambda vae, x: pv.traverse(vae.model, vae.guide, x, num_steps=2, seed=0),
}


@functools.cache
def of_squares(name: str) -> Any:
    """What is drawn from a VAE of images of 2 x 2. A plot changes none of it."""
    torch.manual_seed(0)
    vae = pv.mlp_vae(4, 2, likelihood=pv.nn.Normal(1.0), hidden=())
    return OF_SQUARES[name](vae, torch.zeros(3, 4))


def linear_gaussian() -> pv.exact.LinearGaussian:
    return pv.exact.LinearGaussian(torch.tensor([[1.0], [2.0]]), torch.zeros(2), torch.tensor(0.5))


def fused(optim_constructor: Any, optim_args: Any, clip_args: Any) -> Any:
    """One step."""
    optim = pv.FusedOptim(optim_constructor, optim_args, clip_args)
    parameter = torch.ones(2, requires_grad=True)
    parameter.sum().backward()
    optim({parameter})
    return parameter.detach()


def vae() -> Any:
    torch.manual_seed(0)
    return pv.mlp_vae(3, 2, likelihood=pv.nn.Normal(1.0), hidden=(4,))


def conditional() -> Any:
    torch.manual_seed(0)
    return pv.mlp_conditional_vae(3, 2, 2, likelihood=pv.nn.Normal(1.0), hidden=(4,))


def missing() -> Any:
    torch.manual_seed(0)
    return pv.mlp_missing_vae(3, 2, likelihood=pv.nn.Normal(1.0), hidden=(4,))


def markov() -> Any:
    torch.manual_seed(0)
    head, normal = pv.nn.Normal(), nn.Sequential(nn.Linear(2, 4), pv.nn.Normal())
    combiner = pv.models.Concatenated(nn.Sequential(nn.Linear(2 + 4, 4), head))
    decoder = nn.Sequential(nn.Linear(2, 3), pv.nn.Normal(1.0))
    return pv.MarkovVAE(pv.nn.StandardNormal(2), normal, decoder, pv.nn.BackwardGRU(3, 4), combiner)


def hierarchical() -> Any:
    torch.manual_seed(0)

    def net(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 2 * outputs), pv.nn.Normal())

    encoders = [pv.models.Concatenated(net(1 + 3, 2)), net(3, 1)]
    return pv.HierarchicalVAE(pv.nn.StandardNormal(1), [net(1, 2)], net(2, 3), encoders, [nn.Identity(), nn.Identity()])


def labelled() -> Any:
    torch.manual_seed(0)
    joined, head = pv.models.Concatenated, pv.nn.Normal
    return pv.SemiSupervisedVAE(
        nn.Linear(3, 2),
        joined(nn.Sequential(nn.Linear(5, 4), head())),
        joined(nn.Sequential(nn.Linear(4, 3), head(1.0))),
        pv.nn.StandardNormal(2),
        num_classes=2,
    )


def parts_of(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(model, name) for name in names}


def method(name: str, of: Callable[[], Any]) -> Callable[..., Any]:
    return lambda **arguments: getattr(of(), name)(**arguments)


def fixed(**arguments: Any) -> Callable[[], dict[str, Any]]:
    return lambda: dict(arguments)


def plots() -> Iterator[Other]:
    of_record = {
        "plot_aggregated_posterior": ("sample", lambda: record("AggregatedPosterior")),
        "plot_comparison": (
            "comparison",
            lambda: pv.compare({"a": record("ImportanceSampling"), "b": record("ImportanceSampling")}),
        ),
        "plot_calibration": ("calibration", lambda: record("GuideCalibration")),
        "plot_copies": ("result", looked_at_samples),
        "plot_factors": ("found", lambda: record("MutualInformationGap")),
        "plot_gaps": ("gaps", lambda: record("InferenceGaps")),
        "plot_gaps_per_datum": ("gaps", lambda: record("InferenceGaps")),
        "plot_gaps_side_by_side": ("gaps", lambda: {"a": record("InferenceGaps")}),
        "plot_held_out": ("history", lambda: record("EarlyStopping")),
        "plot_k_curve": ("curve", lambda: record("ImportanceSampling").curve),
        "plot_latents": ("sample", lambda: record("AggregatedPosterior")),
        "plot_likelihood_and_looks": ("result", looked_at_samples),
        "plot_manifold": ("manifold", lambda: of_squares("manifold")),
        "plot_nearest_neighbours": ("result", looked_at_samples),
        "plot_pareto_k": ("evidence", lambda: record("ImportanceSampling")),
        "plot_rate_distortion": ("result", lambda: record("RateDistortion")),
        "plot_reconstructions": ("reconstruction", lambda: of_squares("reconstruct")),
        "plot_samples": ("simulation", lambda: of_squares("simulate")),
        "plot_surgery": ("surgery", lambda: record("ELBOSurgery")),
        "plot_training": ("history", lambda: watched().history()),
        "plot_traversals": ("traversal", lambda: of_squares("traverse")),
        "plot_units": ("activity", lambda: record("ActiveUnits")),
    }
    run = ("color", "label")
    options = {
        "plot_aggregated_posterior": ("num_units",),
        "plot_copies": ("num_images", "cmap"),
        "plot_factors": ("names",),
        "plot_gaps_per_datum": run,
        "plot_held_out": run,
        "plot_k_curve": run,
        "plot_latents": ("units",),
        "plot_likelihood_and_looks": run,
        "plot_manifold": ("cmap",),
        "plot_nearest_neighbours": run,
        "plot_pareto_k": run,
        "plot_rate_distortion": run,
        "plot_reconstructions": ("num_images", "cmap"),
        "plot_samples": ("num_images", "cmap"),
        "plot_training": ("window", *run),
        "plot_traversals": ("cmap",),
        "plot_units": ("num_units", *run),
    }
    for name, (argument, make) in of_record.items():

        def call(name: str = name, **arguments: Any) -> Any:
            try:
                getattr(pv.plots, name)(**arguments)
            finally:
                plt.close("all")

        yield Other(f"plots.{name}", "plots", call, lambda a=argument, m=make: {a: m()}, ("ax", *options.get(name, ())))


def of_records() -> Iterator[Other]:
    cats = {
        "Barrier": lambda: record("AnnealedImportanceSampling").barrier,
        "Calibration": lambda: record("GuideCalibration"),
        "Evidence": lambda: record("ImportanceSampling"),
        "Expectation": lambda: record("PosteriorExpectation"),
        "Gaps": lambda: record("InferenceGaps"),
        "KCurve": lambda: record("ImportanceSampling").curve,
        "LeaveOneOutResult": lambda: record("LeaveOneOut"),
        "Sandwich": lambda: record("BidirectionalMonteCarlo"),
        "SelfCheckResult": lambda: record("SelfCheck"),
    }
    for name, make in cats.items():
        kind = getattr(pv, name)
        yield Other(f"{name}.cat", "records", kind.cat, lambda m=make: {"records": [m(), m()]})
        if hasattr(kind, "select"):
            yield Other(f"{name}.select", "records", method("select", make), fixed(kept=torch.tensor([0, 1])))
        for interval in ("confidence_interval", "mean_confidence_interval", "coverage", "larger_part"):
            if hasattr(kind, interval):
                yield Other(f"{name}.{interval}", "records", method(interval, make), fixed(level=0.9))
    evidence = cats["Evidence"]
    yield Other("Evidence.save", "records", method("save", evidence), lambda: {"path": folder() / "evidence.npz"})

    def saved() -> dict[str, Any]:
        path = folder() / "evidence.npz"
        evidence().save(path)
        return {"path": path}

    yield Other("Evidence.load", "records", pv.Evidence.load, saved)
    mean = lambda: evidence().mean()  # noqa: E731
    yield Other("Estimate.confidence_interval", "records", method("confidence_interval", mean), fixed(level=0.9))
    yield Other("Estimate.with_error", "records", method("with_error", mean), fixed(digits=2, sampling=True, unit="nats"))
    numbers = torch.tensor([1.0, 2.0])
    yield Other(
        "Estimate.over_data", "records", pv.Estimate.over_data, fixed(values=numbers, std_errors=numbers, unit="nats")
    )
    both = lambda: {"records": {"a": evidence(), "b": evidence()}, "level": 0.9}  # noqa: E731
    yield Other("compare", "records", pv.compare, both)
    compared = lambda: pv.compare(both()["records"])  # noqa: E731
    yield Other("Comparison.pair", "records", method("pair", compared), fixed(one="a", other="b", elbo=True))
    yield Other("Comparison.difference", "records", method("difference", compared), fixed(one="a", other="b"))
    yield Other("KCurve.from_log_weights", "records", pv.KCurve.from_log_weights, fixed(log_weight=torch.zeros(4, 2)))
    yield Other("Terms.per_datum", "records", method("per_datum", lambda: trained().terms), fixed(plate="data"))
    history = lambda: watched().history()  # noqa: E731
    yield Other("TrainingHistory.to_csv", "records", method("to_csv", history), lambda: {"path": folder() / "history.csv"})


def networks() -> Iterator[Other]:
    x, raw = torch.zeros(4, 3), torch.zeros(4, 6)
    heads = {
        "Bernoulli": (fixed(event_dim=1), x),
        "Binomial": (fixed(total_count=3, event_dim=1), x),
        "Categorical": (fixed(num_classes=2, event_dim=1), raw),
        "ContinuousBernoulli": (fixed(event_dim=1), x),
        "DiscretizedLogistic": (fixed(num_levels=4, event_dim=1), raw),
        "Normal": (fixed(scale=None, event_dim=1), raw),
        "MultivariateNormal": (fixed(), torch.zeros(4, 5)),
        "Poisson": (fixed(event_dim=1), x),
        "NegativeBinomial": (fixed(theta=None, event_dim=1), raw),
        "ZeroInflatedPoisson": (fixed(event_dim=1), raw),
        "ZeroInflatedNegativeBinomial": (fixed(theta="learned", theta_shape=(3,), event_dim=1), raw),
        "Laplace": (fixed(scale=None, event_dim=1), raw),
        "StudentT": (fixed(df=4.0, scale=None, event_dim=1), raw),
        "Gamma": (fixed(concentration=None, event_dim=1), raw),
        "LogNormal": (fixed(scale=None, event_dim=1), raw),
        "DiscretizedLogisticMixture": (fixed(num_levels=4, num_components=2, event_dim=1), raw),
        "Heterogeneous": (fixed(heads=[pv.nn.Normal(), pv.nn.Bernoulli()], widths=(2, 1)), torch.zeros(4, 5)),
        "LowRankNormal": (fixed(rank=1), raw),
        "MixtureNormal": (fixed(num_components=2), raw),
        "Flow": (fixed(latent_dim=2, context_dim=3, transforms=[conditional_affine_autoregressive(2, 3)]), x),
    }
    sizes = {"Heterogeneous": 3}
    for name, (arguments, raw) in heads.items():
        kind = getattr(pv.nn, name)
        head = functools.partial(kind, **arguments())
        yield Other(f"nn.{name}", "networks", lambda k=kind, **a: k(**a), arguments)
        yield Other(f"nn.{name}, called", "networks", lambda h=head, **a: h()(**a), fixed(raw=raw))
        size = fixed(event_size=sizes.get(name, 2))
        yield Other(f"nn.{name}.num_outputs", "networks", lambda h=head, **a: h().num_outputs(**a), size)
        at = head()(raw)
        yield Other(f"nn.{name}, log_prob", "networks", at.log_prob, fixed(value=torch.ones(4, *at.event_shape)))
    sized = lambda size_factor: pv.nn.Poisson()(x, size_factor)  # noqa: E731
    yield Other("nn.Poisson, with a size factor", "networks", sized, fixed(size_factor=torch.ones(4, 1)))
    for name in ("Log", "Log1p"):
        yield Other(f"nn.{name}, called", "networks", getattr(pv.nn, name)(), fixed(x=x + 1))
    encoder = nn.Sequential(nn.Linear(3, 4), pv.nn.Normal())
    seen = fixed(encoder=encoder, pseudo_inputs=torch.zeros(2, 3), bounds=(-1.0, 1.0))
    yield Other("nn.VampPrior", "networks", pv.nn.VampPrior, seen)
    yield Other("nn.MixturePrior", "networks", pv.nn.MixturePrior, fixed(latent_dim=2, num_components=2))
    flow = fixed(latent_dim=2, transforms=[affine_autoregressive(2)])
    yield Other("nn.FlowPrior", "networks", pv.nn.FlowPrior, flow)
    yield Other("nn.StandardNormal", "networks", pv.nn.StandardNormal, fixed(latent_dim=2))
    yield Other("nn.OneHot", "networks", pv.nn.OneHot, fixed(num_classes=2, event_dim=1))
    yield Other("nn.OneHot, called", "networks", lambda x: pv.nn.OneHot(2)(x), fixed(x=torch.tensor([[0, 1]])))
    yield Other("nn.Scale", "networks", pv.nn.Scale, fixed(factor=2.0, shift=1.0))
    yield Other("nn.Scale, called", "networks", lambda x: pv.nn.Scale(2.0)(x), fixed(x=x))
    yield Other("nn.BesideMask", "networks", pv.nn.BesideMask, fixed(layer=nn.Identity()))
    beside = lambda x: pv.nn.BesideMask(nn.Identity())(x)  # noqa: E731
    yield Other("nn.BesideMask, called", "networks", beside, fixed(x=torch.tensor([[2.0, 0.0, 1.0, 0.0]])))
    yield Other("nn.BatchApply", "networks", pv.nn.BatchApply, fixed(network=nn.Linear(3, 2), event_dim=1))
    yield Other("nn.BatchApply, called", "networks", lambda x: pv.nn.BatchApply(nn.Linear(3, 2))(x), fixed(x=x))
    mlp = fixed(in_features=3, out_features=2, hidden=(4,), activation=nn.ReLU)
    yield Other("nn.MLP", "networks", pv.nn.MLP, mlp)
    yield Other("nn.MLP, called", "networks", lambda x: pv.nn.MLP(3, 2)(x), fixed(x=x))
    gru = fixed(data_dim=3, hidden_dim=2, first=nn.Identity())
    yield Other("nn.BackwardGRU", "networks", pv.nn.BackwardGRU, gru)
    read = lambda x, lengths: pv.nn.BackwardGRU(3, 2)(x, lengths)  # noqa: E731
    sequences = fixed(x=torch.zeros(4, 2, 3), lengths=torch.tensor([2, 1, 2, 2]))
    yield Other("nn.BackwardGRU, called", "networks", read, sequences)
    shape = (1, 4, 4)
    conv = fixed(image_shape=shape, out_features=2, channels=(2,), activation=nn.ReLU)
    yield Other("nn.ConvNet", "networks", pv.nn.ConvNet, conv)
    yield Other(
        "nn.ConvNet, called",
        "networks",
        lambda x: pv.nn.ConvNet(shape, 2, channels=(2,))(x),
        fixed(x=torch.zeros(2, 1, 4, 4)),
    )
    deconv = fixed(in_features=2, image_shape=shape, channels=(2,), activation=nn.ReLU)
    yield Other("nn.DeconvNet", "networks", pv.nn.DeconvNet, deconv)
    yield Other(
        "nn.DeconvNet, called", "networks", lambda z: pv.nn.DeconvNet(2, shape, channels=(2,))(z), fixed(z=torch.zeros(4, 2))
    )


def models() -> Iterator[Other]:
    head, posterior = pv.nn.Normal(1.0), pv.nn.Normal()
    vectors: dict[str, Any] = {"data_dim": 3, "latent_dim": 2, "likelihood": head, "posterior": posterior, "hidden": (4,)}
    yield Other("mlp_vae", "models", pv.mlp_vae, fixed(**vectors, activation=nn.ReLU))
    yield Other("mlp_missing_vae", "models", pv.mlp_missing_vae, fixed(**vectors, activation=nn.ReLU))
    given = fixed(**vectors, condition_dim=2, activation=nn.ReLU)
    yield Other("mlp_conditional_vae", "models", pv.mlp_conditional_vae, given)
    images = fixed(
        image_shape=(1, 4, 4),
        latent_dim=2,
        likelihood=pv.nn.Normal(1.0, event_dim=3),
        posterior=posterior,
        channels=(2,),
        activation=nn.ReLU,
    )
    yield Other("conv_vae", "models", pv.conv_vae, images)
    yield Other("LinearVAE", "models", pv.LinearVAE, fixed(data_dim=3, latent_dim=2, scale=1.0))
    networks = {
        "VAE": (vae, ("encoder", "decoder", "prior")),
        "MissingDataVAE": (missing, ("encoder", "decoder", "prior")),
        "ConditionalVAE": (conditional, ("encoder", "decoder", "prior")),
        "MarkovVAE": (markov, ("initial", "transition", "decoder", "encoder", "combiner")),
        "HierarchicalVAE": (hierarchical, ("prior", "layers", "decoder", "encoders", "features")),
    }
    for name, (make, names) in networks.items():
        parts = lambda m=make, names=names: parts_of(m(), names)  # noqa: E731
        yield Other(name, "models", getattr(pv, name), parts)
    factor = lambda z, y: pv.models.WithSizeFactor(pv.nn.MLP(2, 3), pv.nn.Poisson())(z, y)  # noqa: E731
    yield Other("models.WithSizeFactor, called", "models", factor, fixed(z=torch.zeros(4, 2), y=torch.ones(4, 1)))
    counts = fixed(network=nn.Linear(2, 3), head=pv.nn.Poisson())
    yield Other("models.WithSizeFactor", "models", pv.models.WithSizeFactor, counts)
    guide = lambda **arguments: pv.AmortizedGuide(**arguments)(data())  # noqa: E731
    call = {"model": Linear().model, "network": nn.Linear(3, 4), "args": (data(),), "kwargs": {}}
    yield Other("AmortizedGuide", "models", guide, fixed(**call, family="full", conditioned=True, datum_plate="data"))
    joined = lambda x, y: pv.models.Concatenated(nn.Linear(5, 2))(x, y)  # noqa: E731
    yield Other("models.Concatenated", "models", joined, fixed(x=data(), y=torch.zeros(4, 2)))
    x, y, z = data(), torch.zeros(4, 2), torch.zeros(4, 2)
    sequences = {"x": torch.zeros(4, 2, 3), "lengths": torch.tensor([2, 1, 2, 2])}
    yield Other("MarkovVAE.model", "models", lambda x, lengths: markov().model(x, lengths), fixed(**sequences))
    yield Other("MarkovVAE.guide", "models", lambda x, lengths: markov().guide(x, lengths), fixed(**sequences))
    yield Other("MarkovVAE.reconstruct", "models", lambda x, lengths: markov().reconstruct(x, lengths), fixed(**sequences))
    yield Other("MarkovVAE.decode", "models", lambda z: markov().decode(z), fixed(z=torch.zeros(4, 2, 2)))
    steps = lambda n, num_steps: markov().generate(n, num_steps)  # noqa: E731
    yield Other("MarkovVAE.generate", "models", steps, fixed(n=2, num_steps=2))
    yield Other("HierarchicalVAE.decode", "models", lambda z: hierarchical().decode(z), fixed(z=z))
    yield Other("HierarchicalVAE.reconstruct", "models", lambda x: hierarchical().reconstruct(x), fixed(x=x))
    yield Other("HierarchicalVAE.generate", "models", lambda n: hierarchical().generate(n), fixed(n=2))
    yield Other("VAE.encode", "models", lambda x: vae().encode(x), fixed(x=x))
    yield Other("MissingDataVAE.encode", "models", lambda x: missing().encode(x), fixed(x=x))
    yield Other("VAE.decode", "models", lambda z: vae().decode(z), fixed(z=z))
    yield Other("VAE.reconstruct", "models", lambda x: vae().reconstruct(x), fixed(x=x))
    yield Other("VAE.generate", "models", lambda n: vae().generate(n), fixed(n=2))
    yield Other("VAE.interpolate", "models", lambda **a: vae().interpolate(**a), fixed(x0=x, x1=x, num_steps=2))
    yield Other("ConditionalVAE.encode", "models", lambda x, y: conditional().encode(x, y), fixed(x=x, y=y))
    yield Other("ConditionalVAE.decode", "models", lambda z, y: conditional().decode(z, y), fixed(z=z, y=y))
    yield Other("ConditionalVAE.reconstruct", "models", lambda x, y: conditional().reconstruct(x, y), fixed(x=x, y=y))
    yield Other("ConditionalVAE.generate", "models", lambda y: conditional().generate(y), fixed(y=y))
    roles = ("classifier", "encoder", "decoder", "prior")
    options = {"num_classes": 2, "class_probs": (0.5, 0.5), "alpha": 1.0}
    semi = lambda: {**parts_of(labelled(), roles), **options}  # noqa: E731
    yield Other("SemiSupervisedVAE", "models", pv.SemiSupervisedVAE, semi)
    classes = torch.tensor([0, 1, 1, 0])
    for name, arguments in {
        "classify": {"x": x},
        "encode": {"x": x, "y": classes},
        "decode": {"z": z, "y": classes},
        "reconstruct": {"x": x, "y": classes},
        "generate": {"y": classes},
    }.items():
        yield Other(f"SemiSupervisedVAE.{name}", "models", method(name, labelled), fixed(**arguments))


def sums() -> Iterator[Other]:
    x = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    model = linear_gaussian()
    q = model.posterior(x)
    exact = pv.exact
    parts = fixed(weight=model.weight, bias=model.bias, variance=model.variance)
    yield Other("exact.LinearGaussian", "exact sums, arithmetic", exact.LinearGaussian, parts)
    yield Other(
        "exact.LinearGaussian.fit",
        "exact sums, arithmetic",
        exact.LinearGaussian.fit,
        fixed(x=x, latent_dim=1, variance=0.5),
    )
    fit_beta = fixed(x=x, latent_dim=1, variance=0.5, beta=1.0)
    yield Other("exact.LinearGaussian.fit_beta", "exact sums, arithmetic", exact.LinearGaussian.fit_beta, fit_beta)
    most = fixed(x=x, latent_dim=1, variance=0.5)
    yield Other(
        "exact.LinearGaussian.max_log_likelihood", "exact sums, arithmetic", exact.LinearGaussian.max_log_likelihood, most
    )
    for name, arguments in {
        "log_evidence": {"x": x},
        "posterior": {"x": x},
        "beta_posterior": {"x": x, "beta": 1.0},
        "optimal_diagonal": {"x": x},
        "rate": {"q": q},
        "distortion": {"x": x, "q": q},
        "elbo": {"x": x, "q": q},
        "rate_distortion": {"x": x, "beta": torch.tensor([1.0])},
        "gaps": {"x": x, "q": q},
    }.items():
        yield Other(f"exact.LinearGaussian.{name}", "exact sums, arithmetic", getattr(model, name), fixed(**arguments))
    yield Other(
        "exact.collapsed", "exact sums, arithmetic", exact.collapsed, fixed(x=x, latent_dim=1, variance=0.5, beta=1.0)
    )
    joint = fixed(log_joint=torch.zeros(2, 3), num_latents=1)
    yield Other("exact.enumerate_log_evidence", "exact sums, arithmetic", exact.enumerate_log_evidence, joint)
    supports = fixed(log_joint=lambda z: z + torch.zeros(3), supports=[torch.tensor([0.0, 1.0])])
    yield Other("exact.enumerate_log_joint", "exact sums, arithmetic", exact.enumerate_log_joint, supports)
    nodes = fixed(
        log_joint=lambda z: -z.square().sum(-1),
        num_latents=1,
        num_nodes=20,
        loc=torch.zeros(1, 1),
        scale=torch.ones(1, 1),
        chunk_size=10,
    )
    yield Other("exact.quadrature_log_evidence", "exact sums, arithmetic", exact.quadrature_log_evidence, nodes)
    yield Other(
        "exact.scalar_posterior", "exact sums, arithmetic", exact.scalar_posterior, fixed(x=torch.zeros(2), w=1.0, s=1.0)
    )
    weights = torch.zeros(200, 2)
    for name in ("effective_sample_size", "log_mean_exp_std_error", "pareto_k", "pareto_smooth", "log_mean_exp"):
        yield Other(
            f"ops.{name}",
            "exact sums, arithmetic",
            getattr(pv.ops, name),
            (lambda n=name: {("x" if n == "log_mean_exp" else "log_weights"): weights, "dim": 0}),
        )
    yield Other(
        "ops.jackknife_log_mean_exp",
        "exact sums, arithmetic",
        pv.ops.jackknife_log_mean_exp,
        fixed(log_weights=weights, order=1, dim=0),
    )
    yield Other(
        "ops.fit_generalized_pareto", "exact sums, arithmetic", pv.ops.fit_generalized_pareto, fixed(x=weights + 1, dim=0)
    )
    yield Other("ops.pareto_k_threshold", "exact sums, arithmetic", pv.ops.pareto_k_threshold, fixed(num_particles=100))
    yield Other(
        "ops.index_code_information",
        "exact sums, arithmetic",
        pv.ops.index_code_information,
        fixed(log_q=torch.zeros(2, 2), num_data=3),
    )


def training() -> Iterator[Other]:
    ramp: dict[str, Any] = {"start": 0.0, "end": 1.0}
    yield Other("LinearAnnealing", "training", pv.LinearAnnealing, fixed(num_steps=3, delay=0, **ramp))
    yield Other("CosineAnnealing", "training", pv.CosineAnnealing, fixed(num_steps=3, delay=0, **ramp))
    sigmoid = fixed(num_steps=3, delay=0, steepness=5.0, **ramp)
    yield Other("SigmoidAnnealing", "training", pv.SigmoidAnnealing, sigmoid)
    yield Other("CyclicalAnnealing", "training", pv.CyclicalAnnealing, fixed(period=4, num_cycles=2, ramp=0.5, **ramp))
    yield Other("a schedule, called", "training", lambda step: pv.LinearAnnealing(3)(step), fixed(step=1))
    unfinished = fixed(schedule=pv.LinearAnnealing(3), num_updates=10)
    yield Other("schedules.warn_if_unfinished", "training", pv.schedules.warn_if_unfinished, unfinished)
    adam = fixed(optim_constructor=torch.optim.Adam, optim_args={"lr": 0.1}, clip_args={"clip_norm": 1.0})
    yield Other("FusedOptim", "training", fused, adam)
    yield Other("FusedOptim, lr", "training", lambda lr: fused(torch.optim.Adam, {"lr": lr}, None), fixed(lr=0.1))
    for bound in ("clip_norm", "clip_value"):
        clipped = lambda bound=bound, **a: fused(torch.optim.SGD, {"lr": 0.1}, a)  # noqa: E731
        yield Other(f"FusedOptim, {bound}", "training", clipped, lambda b=bound: {b: 1.0})
    state = lambda state_dict: pv.FusedOptim(torch.optim.Adam, {"lr": 0.1}).set_state(state_dict)  # noqa: E731
    yield Other("FusedOptim.set_state", "training", state, fixed(state_dict={}))
    monitor = lambda: {"objective": pv.BetaTrace_ELBO(), "num_updates": 10, "progress": False}  # noqa: E731
    yield Other("Monitor", "training", pv.Monitor, monitor)
    yield Other("Monitor.watch", "training", lambda batches: list(watched().watch(batches)), fixed(batches=[]))
    yield Other("EarlyStopping.look", "training", lambda step: early().look(step), fixed(step=1))
    yield Other(
        "an objective, num_updates", "training", lambda n: setattr(pv.BetaTrace_ELBO(), "num_updates", n), fixed(n=3)
    )


def of_pairs() -> Iterator[Other]:
    """Arguments beside model, guide and data."""
    few = functools.partial(pv.ImportanceSampling, num_particles=4, seed=0, check=False)

    def evaluated(estimator: Any) -> Any:
        return pv.evaluate(estimator, [(data(),)], progress=False, seed=0)

    def expected(f: Any) -> Any:
        pair = Linear()
        return pv.PosteriorExpectation(pair.model, pair.guide, f, num_particles=4, seed=0)(data())

    def aggressive(svi: Any) -> Any:
        return pv.AggressiveTraining(svi, [(data(),)], max_inner_steps=1, window=1).step()

    def svi() -> dict[str, Any]:
        pair = Linear()
        return {"svi": pyro.infer.SVI(pair.model, pair.guide, pyro.optim.SGD({"lr": 0.0}), pv.BetaTrace_ELBO())}

    def refitted(optim: Any) -> Any:
        pair, x = Linear(), [(data(),)]
        return pv.refit_guide(pair.model, pair.guide, x, optim, test=x, num_epochs=1, evidence=few, seed=0, progress=False)

    def swept(make_pair: Any, betas: Any) -> Any:
        return pv.beta_sweep(make_pair, [(data(),)], betas, num_epochs=1, evidence=few, seed=0, progress=False)

    def pair(beta: float) -> Any:
        made = Linear()
        return made.model, made.guide

    group = "arguments beside a pair"
    yield Other("evaluate", group, evaluated, lambda: {"estimator": few(*pair(1.0))})
    yield Other("PosteriorExpectation", group, expected, fixed(f=lambda z: z["z"]))
    yield Other("AggressiveTraining", group, aggressive, svi)
    yield Other("refit_guide", group, refitted, lambda: {"optim": pyro.optim.SGD({"lr": 0.0})})
    yield Other("beta_sweep", group, swept, fixed(make_pair=pair, betas=[1.0]))


OTHERS = [*of_pairs(), *of_records(), *plots(), *networks(), *models(), *sums(), *training()]


def other_cells(other: Other) -> list[OtherCell]:
    names = (*other.arguments(), *other.also)
    return [OtherCell(other, name, row) for name in names for row in VALUES if (name, row) not in LEFT_OUT]


def other_outcomes(other: Other) -> Iterator[tuple[OtherCell, Outcome]]:
    for cell in other_cells(other):
        pyro.clear_param_store()
        torch.manual_seed(0)
        arguments = {**other.arguments(), cell.argument: VALUES[cell.row]}
        yield cell, judged(lambda a=arguments: other.call(**a), [], leaves=True)
