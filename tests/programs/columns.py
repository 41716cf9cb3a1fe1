"""What each column of the table runs, and how its number is held: by the program's right values, or a named refusal."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae import errors
from pyro_vae.kernel import Pair

from .program import Program

SIGMAS, SLACK = 5.0, 0.02  # errors, and nats for the bias of a logarithm of a mean
LARGEST_ERROR = 0.5  # nats: a blunt number holds nothing
NAMED = tuple(getattr(errors, name) for name in errors.__all__ if name.endswith("Error"))
HELD, WHOLE = "right", "whole gap"
DIAGNOSE = import_module("pyro_vae.report.diagnose")  # `pv.diagnose` is its function


def cell(program: Program, column: str) -> str:
    """What stands in the table: "right", "whole gap", or the name of a refusal and its reason, or what else the number is.

    :raises AssertionError: for a wrong number, and for a refusal that the program does not expect.
    """
    pyro.clear_param_store()
    if column in program.other:
        return f"Other: {program.other[column]}"
    expected = program.refused.get(column)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a doubt is no refusal, and excuses no number
        try:
            found = COLUMNS[column](program)
        except NAMED as error:
            assert expected is not None and type(error).__name__ == expected[0], f"{type(error).__name__}: {error}"
            return f"{expected[0]}: {expected[1]}"
    assert expected is None, f"answered, but {expected[0]} was expected"
    return found


def options(program: Program) -> dict[str, Any]:
    return {"seed": 0, **program.options}


def close(value: Tensor, std_error: Tensor, right: Tensor, what: str) -> None:
    error = std_error.double().nan_to_num(nan=0.0)
    off = (value.double() - right).abs() > SIGMAS * error + SLACK
    assert not bool(off.any()), f"{what}: {value.tolist()} +- {error.tolist()}, right {right.tolist()}"
    assert float(error.max()) < LARGEST_ERROR, f"{what}: errors {error.tolist()}"


def importance(program: Program) -> str:
    found = pv.ImportanceSampling(program.model, program.guide, num_particles=3000, **options(program))(
        *program.args, **program.kwargs
    )
    close(found.log_evidence, found.std_error, program.log_evidence, "log p(x)")
    if program.elbo is not None:
        close(found.elbo, found.elbo_std_error, program.elbo, "ELBO")
    return HELD


def adaptive(program: Program) -> str:
    found = pv.AdaptiveImportanceSampling(program.model, program.guide, num_particles=1000, **options(program))(
        *program.args, **program.kwargs
    )
    close(found.log_evidence, found.std_error, program.log_evidence, "log p(x)")
    return HELD


def gaps(program: Program) -> str:
    found = pv.InferenceGaps(program.model, program.guide, num_particles=500, **options(program))(
        *program.args, **program.kwargs
    )
    close(found.log_evidence, found.std_errors["log_evidence"], program.log_evidence, "log p(x)")
    if program.elbo is not None:
        close(found.elbo, found.std_errors["elbo"], program.elbo, "ELBO")
    if found.unsplit:
        return WHOLE
    above = (found.optimal_elbo.double() - program.log_evidence).clamp(min=0.0)
    close(above, found.std_errors["optimal_elbo"], torch.zeros_like(above), "L[q*] above log p(x)")
    if program.gaps is not None:
        for number, name in enumerate(("amortization", "approximation")):
            right = program.gaps[:, number]
            close(getattr(found, name), found.std_errors[name], right, name)
    return HELD


def units(program: Program) -> str:
    found = pv.ActiveUnits(program.model, program.guide, num_particles=300, **options(program))(
        [program], args=arguments, progress=False
    )
    known = (program.site_kl or {}).keys() & found.site_kl.keys()
    assert known or program.site_kl is None
    for site in known:
        estimate, right = found.site_kl[site], torch.tensor([program.site_kl[site]])
        close(estimate.value.reshape(1), estimate.std_error.reshape(1), right, f"KL of {site}")
    return HELD


def surgery(program: Program) -> str:
    found = pv.ELBOSurgery(program.model, program.guide, num_particles=300, **options(program))(
        [program], args=arguments, progress=False
    )
    with Pair(program.model, program.guide, **program.options).open(program.args, program.kwargs, 0) as call:
        names = call.structure.latents or call.structure.guide_enumerated
    if program.site_kl is not None and set(names) <= program.site_kl.keys():
        right = torch.tensor([sum(program.site_kl[name] for name in names)])
        close(found.kl.value.reshape(1), found.kl.std_error.reshape(1), right, "KL")
    assert abs(float(found.kl.value - found.mutual_information.value - found.marginal_kl.value)) < 1e-4
    margin = SIGMAS * float(found.mutual_information.std_error) + 1e-6
    assert -margin <= float(found.mutual_information.value) <= math.log(found.num_data) + margin
    return HELD


def diagnose(program: Program) -> str:
    """The mean of log p(x) over the data. The self-check has short chains: it runs, but none of its numbers is held here."""
    short = partial(pv.SelfCheck, num_steps=10)
    with patch("pyro_vae.report.run.evaluate", once()), patch.object(DIAGNOSE, "SelfCheck", short):
        page = pv.diagnose(
            program.model,
            program.guide,
            train=[program],
            test=[program],
            args=arguments,
            num_particles=200,
            progress=False,
            **options(program),
        )
    mean = page.test.evidence.mean()
    close(mean.value.reshape(1), mean.std_error.reshape(1), program.log_evidence.mean().reshape(1), "mean log p(x)")
    assert str(page)
    return HELD


def once() -> Callable:
    """`pv.evaluate`, but an estimator runs on the first loader only: the training data of the table are its test data."""
    records: dict[Any, Any] = {}

    def evaluate(estimator: Any, loader: Any, **kwargs: Any) -> Any:
        if estimator not in records:
            records[estimator] = pv.evaluate(estimator, loader, **kwargs)
        return records[estimator]

    return evaluate


def beta(program: Program) -> str:
    """Minus the sum of the ELBOs, less log p of what is given."""
    with Pair(program.model, program.guide, **program.options).open(program.args, program.kwargs, 0) as call:
        enumerated, given = call.layout.enumerated, call.structure.given
    chosen = pv.BetaTraceEnum_ELBO if enumerated else pv.BetaTrace_ELBO
    at_once = not program.particles_in_a_loop
    objective = chosen(num_particles=40, max_plate_nesting=3, vectorize_particles=at_once)
    pyro.set_rng_seed(0)
    with torch.no_grad():
        num_losses = 40 if at_once else 12
        losses = [objective.loss(program.model, program.guide, *program.args, **program.kwargs) for _ in range(num_losses)]
    assert program.elbo is not None
    losses = torch.tensor([float(loss) for loss in losses], dtype=torch.float64)
    right = -program.elbo.sum() - log_prob_of(given, program)
    close(losses.mean().reshape(1), (losses.std() / len(losses) ** 0.5).reshape(1), right.reshape(1), "loss")
    return HELD


def log_prob_of(given: tuple[str, ...], program: Program) -> Tensor:
    """log p of the sites outside the data, at their values."""
    guide = poutine.trace(program.guide).get_trace(*program.args, **program.kwargs)
    model = poutine.trace(poutine.replay(program.model, guide)).get_trace(*program.args, **program.kwargs)
    sites = [model.nodes[name] for name in given]
    return sum((site["fn"].log_prob(site["value"]).sum().detach() for site in sites), torch.zeros(()))


def arguments(program: Program) -> Any:
    return program.args if not program.kwargs else dict(program.kwargs)


COLUMNS: dict[str, Callable[[Program], str]] = {
    "importance": importance,
    "adaptive": adaptive,
    "gaps": gaps,
    "units": units,
    "surgery": surgery,
    "diagnose": diagnose,
    "beta": beta,
}
