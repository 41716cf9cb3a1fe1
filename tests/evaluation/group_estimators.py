"""Checks of `group_program.py` about everything that goes over a loader."""

import contextlib
import dataclasses
import functools
import io
import itertools
import sys
import warnings
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
import torch.distributed as group
from pair_helpers import diagonal_family, guide_of, linear_gaussian, model_of, quiet, shifted_family
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pyro_vae as pv
from pyro_vae.errors import EmptyBatchError, InvalidDataError, ProcessesError, UnreliableEvidenceWarning

turns = itertools.count()  # the same on all ranks


@contextlib.contextmanager
def raises(kind, *parts):
    try:
        yield
    except kind as error:
        assert type(error) is kind, type(error)
        assert all(part in str(error) for part in parts), (parts, str(error))
    else:
        raise AssertionError(f"no {kind.__name__}")


def differences(a, b, name=""):
    """Where two records are not the same bit for bit."""
    if isinstance(a, torch.Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0))
        return [] if same else [name]
    if dataclasses.is_dataclass(a):
        names = [f.name for f in dataclasses.fields(a) if f.name not in ("seconds", "pairs", "stores")]
        return [d for n in names for d in differences(getattr(a, n), getattr(b, n), f"{name}.{n}")]
    if isinstance(a, dict):
        return [d for key in {**a, **b} for d in differences(a[key], b[key], f"{name}[{key}]")]
    if isinstance(a, (tuple, list)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{name}[{i}]")]
    return [] if a == b or (a != a and b != b) else [f"{name}: {a} != {b}"]


def pair(num_data=11):
    lm, x = linear_gaussian(num_data=num_data)
    return model_of(lm), guide_of(diagonal_family(lm, 0.1, 1.2)), x


def same_as_one_process(run):
    """The numbers of the group are those of one process, on every rank. The ranks take turns at being that process."""
    turn, alone = next(turns) % group.get_world_size(), [None]
    with quiet():
        shared = run()
        if group.get_rank() == turn:
            with pv.single_process():
                alone = [run()]
    group.broadcast_object_list(alone, src=turn)
    found = differences(shared, alone[0])
    assert not found, found
    return shared


ESTIMATORS = {
    "importance": functools.partial(pv.ImportanceSampling, num_particles=150),
    "adaptive": functools.partial(pv.AdaptiveImportanceSampling, num_particles=120, num_gradients=10),
    "annealed": functools.partial(pv.AnnealedImportanceSampling, num_steps=5, num_chains=2, progress=False),
    "auto": functools.partial(pv.AutoEvidence, tolerance=0.5),
    "gaps": functools.partial(pv.InferenceGaps, num_particles=60),
    "calibration": functools.partial(pv.GuideCalibration, num_particles=30),
}


def check_estimators_are_those_of_one_process():
    model, guide, x = pair()
    for make in ESTIMATORS.values():
        run = functools.partial(pv.evaluate, make(model, guide), DataLoader(TensorDataset(x), 4), seed=3, progress=False)
        assert len(same_as_one_process(run)) == 11


def check_one_batch_is_fewer_than_ranks():
    model, guide, x = pair(5)
    estimator = pv.ImportanceSampling(model, guide, num_particles=150)
    same_as_one_process(lambda: pv.evaluate(estimator, [x], seed=0, progress=False))


def check_a_seed_of_the_estimator():
    model, guide, x = pair()
    estimator = pv.ImportanceSampling(model, guide, num_particles=150, seed=5)
    same_as_one_process(lambda: pv.evaluate(estimator, x.split(3), progress=False))


def check_no_seed_is_the_fresh_one_of_rank_0():
    model, guide, x = pair()
    records = []
    for _ in range(2):
        with quiet():
            records.append(pv.evaluate(pv.ImportanceSampling(model, guide, num_particles=150), x.split(3), progress=False))
    everywhere = [None] * group.get_world_size()
    group.all_gather_object(everywhere, records[0].log_evidence)
    assert all(torch.equal(one, everywhere[0]) for one in everywhere)
    assert not torch.isclose(records[0].log_evidence, records[1].log_evidence, rtol=0, atol=1e-12).any()


def check_the_random_state_stays_under_a_seed():
    model, guide, x = pair()
    before = torch.get_rng_state()
    with quiet():
        pv.evaluate(pv.ImportanceSampling(model, guide, num_particles=150), x.split(3), seed=1, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def check_looks_at_the_latents():
    model, guide, x = pair()
    labels = torch.arange(11) % 2
    loader = DataLoader(TensorDataset(x, labels), 3)
    correlated = guide_of(shifted_family(linear_gaussian(num_data=11)[0], lambda x: 0.1))
    options = {"progress": False}
    runs = {
        "units": lambda: pv.ActiveUnits(model, guide, seed=1)(loader, **options),
        "units of a joint guide": lambda: pv.ActiveUnits(model, correlated, seed=1)(loader, **options),
        "rate": lambda: pv.RateDistortion(model, guide, num_steps=20, num_chains=2, seed=1)(loader, **options),
        "sample": lambda: pv.AggregatedPosterior(model, guide, seed=1)(loader, labels=lambda b: b[1], **options),
        "surgery": lambda: pv.ELBOSurgery(model, guide, seed=1)(loader, **options),
        "some draws": lambda: pv.ELBOSurgery(model, guide, seed=1, num_draws=5, num_particles=3)(loader, **options),
        "minibatch": lambda: pv.ELBOSurgery(model, guide, seed=1, aggregate="minibatch")(loader, **options),
        "joint": lambda: pv.ELBOSurgery(model, correlated, seed=1, aggregate="leave-one-out")(loader, **options),
        "gap": lambda: pv.MutualInformationGap(model, guide, seed=1, num_particles=2)(loader, **options),
        "looks": lambda: pv.SampleCheck(model, guide, seed=1)(loader, train=x.repeat(3, 1).split(5), **options),
    }
    for name, run in runs.items():
        try:
            same_as_one_process(run)
        except Exception as error:
            raise AssertionError(name) from error


def check_many_blocks_of_rows():
    """With more than one block of rows each rank has some of its own."""
    from pyro_vae.latent import aggregated_density

    model, guide, x = pair(60)
    before, aggregated_density.BLOCK_BYTES = aggregated_density.BLOCK_BYTES, {"cpu": 3000, "cuda": 3000}
    try:
        same_as_one_process(lambda: pv.ELBOSurgery(model, guide, seed=1)(x.split(16), progress=False))
        labels = torch.arange(60) % 3
        loader = DataLoader(TensorDataset(x, labels), 16)
        same_as_one_process(lambda: pv.MutualInformationGap(model, guide, seed=1)(loader, progress=False))
    finally:
        aggregated_density.BLOCK_BYTES = before


def check_surgery_without_a_seed_is_the_same_everywhere():
    model, guide, x = pair()
    with quiet():
        found = pv.ELBOSurgery(model, guide, num_draws=5)(x.split(3), progress=False)
    everywhere = [None] * group.get_world_size()
    group.all_gather_object(everywhere, float(found.kl.value))
    assert len(set(everywhere)) == 1


def check_early_stopping():
    model, guide, x = pair()

    def run():
        stopping = pv.EarlyStopping(model, guide, list(x.split(4)), every=1, patience=2)
        said = [stopping(step) for step in range(4)]
        return stopping.history(), said

    same_as_one_process(run)


def check_early_stopping_with_held_out_data_of_each_rank():
    model, guide, x = pair()
    stopping = pv.EarlyStopping(model, guide, [x + group.get_rank()], every=1)
    with raises(ProcessesError, "batch 0 of rank 1"):
        stopping(0)


def check_beta_sweep_is_each_ranks_own():
    def make_pair(beta):
        vae = pv.mlp_vae(4, 2, likelihood=pv.nn.Normal(), hidden=(3,))
        return vae.model, vae.guide

    _, _, x = pair()
    with quiet():
        sweep = pv.beta_sweep(make_pair, [x.float()], (1.0,), num_epochs=1, seed=group.get_rank(), progress=False)
    assert bool(sweep.elbo.isfinite().all())


def check_diagnose():
    """With chains of the self-check that are shorter than its own."""
    model, guide, x = pair()
    short = functools.partial(pv.SelfCheck, num_steps=5, num_chains=2)
    with mock.patch.object(sys.modules["pyro_vae.report.diagnose"], "SelfCheck", short):
        page = same_as_one_process(
            lambda: pv.diagnose(model, guide, train=x.split(3), test=x[:5].split(3), num_particles=100, progress=False)
        )
    assert not page.left_out.keys() & {"units", "surgery", "self-check", "calibration"}, page.left_out


def check_progress_and_warnings_on_rank_0_only():
    model, guide, x = pair()
    hidden = io.StringIO()
    far = guide_of(lambda x: dist.Normal(x[:, :2] + 30.0, 0.3).to_event(1))
    with contextlib.redirect_stderr(hidden), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        pv.evaluate(pv.ImportanceSampling(model, far, num_particles=150), x.split(2), seed=0)
        pv.ELBOSurgery(model, guide, seed=0)(x.split(2))
    doubts = [w for w in found if issubclass(w.category, UnreliableEvidenceWarning)]
    if group.get_rank() == 0:
        assert len(doubts) == 1, found
        assert "6/6" in hidden.getvalue(), hidden.getvalue()
    else:
        assert not found, [str(w.message) for w in found]
        assert hidden.getvalue() == ""


def check_other_parameters():
    _, _, x = pair()
    rank = group.get_rank()
    vae = pv.mlp_vae(4, 2, likelihood=pv.nn.Normal(), hidden=(3,))  # another start on each rank
    with raises(ProcessesError, "decoder", "of rank 1 is another", "broadcast"):
        pv.evaluate(pv.ImportanceSampling(vae.model, vae.guide), [x], progress=False)

    def in_closure(shift):
        def family(x):
            return dist.Normal(x[:, :2] + shift, 1.0).to_event(1)

        return family

    lm, x = linear_gaussian()
    for shift in (torch.tensor(0.5 + rank), torch.nn.Linear(2, 2).bias.detach()):
        with raises(ProcessesError, "of rank 1 is another one"):
            pv.ActiveUnits(model_of(lm), guide_of(in_closure(shift)))([x], progress=False)

    def from_store(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc"), 1.0).expand([len(x), 2]).to_event(1))

    pyro.param("loc", torch.full((), float(rank), dtype=torch.double))
    with raises(ProcessesError, "of rank 1 is another one"):
        pv.evaluate(pv.ImportanceSampling(model_of(lm), from_store), [x], progress=False)
    with pv.single_process(), quiet():
        pv.evaluate(pv.ImportanceSampling(model_of(lm), from_store), [x], progress=False)


def check_other_options():
    model, guide, x = pair()
    rank = group.get_rank()
    with raises(ProcessesError, "'num_particles' is 150 on rank 0 and 151 on rank 1"):
        pv.evaluate(pv.ImportanceSampling(model, guide, num_particles=150 + rank), [x], progress=False)
    with raises(ProcessesError, "'seed of the call' is 0 on rank 0 and 1 on rank 1"):
        pv.evaluate(pv.ImportanceSampling(model, guide), [x], seed=rank, progress=False)
    kind = pv.InferenceGaps if rank else pv.ImportanceSampling
    with raises(ProcessesError, "ImportanceSampling", "InferenceGaps"):
        pv.evaluate(kind(model, guide), [x], progress=False)


def check_options_with_functions_are_the_same_options():
    model, guide, x = pair()
    estimator = pv.InferenceGaps(model, guide, evidence=lambda m, g: pv.ImportanceSampling(m, g, num_particles=150))
    same_as_one_process(lambda: pv.evaluate(estimator, x.split(4), seed=0, progress=False))


def check_loaders_that_differ():
    model, guide, x = pair(12)
    estimator, data = pv.ImportanceSampling(model, guide, num_particles=150), TensorDataset(x)
    with raises(ProcessesError, "batch 0 of rank 1", "DistributedSampler"):
        pv.evaluate(estimator, DataLoader(data, 3, sampler=DistributedSampler(data)), progress=False)
    own = torch.Generator().manual_seed(group.get_rank())
    with raises(ProcessesError, "batch 0 of rank 1", "generator"):
        pv.evaluate(estimator, DataLoader(data, 3, shuffle=True, generator=own), progress=False)
    with raises(ProcessesError, "batch 0 of rank 1"):
        pv.evaluate(estimator, DataLoader(data, 3 + group.get_rank()), progress=False)
    with raises(ProcessesError, "batch 2 of rank 1"):
        changed = x.clone()
        changed[7] += 1e-7 * group.get_rank()
        pv.evaluate(estimator, changed.split(3), progress=False)
    with raises(ProcessesError, "batch 3 of rank 1"):
        pv.ELBOSurgery(model, guide)(torch.cat([x[:9], x[9:] + group.get_rank()]).split(3), progress=False)


def check_a_loader_that_shuffles_has_one_order():
    """That of the seed, whatever the random states of the ranks."""
    model, guide, x = pair(12)
    estimator = pv.ImportanceSampling(model, guide, num_particles=150)
    loader = DataLoader(TensorDataset(x), 3, shuffle=True)
    same_as_one_process(lambda: pv.evaluate(estimator, loader, seed=1, progress=False))
    with quiet():
        assert len(pv.evaluate(estimator, loader, progress=False)) == 12


def check_an_empty_loader():
    model, guide, _ = pair()
    with raises(EmptyBatchError, "no batch"):
        pv.evaluate(pv.ImportanceSampling(model, guide), [], progress=False)


def check_a_bad_batch():
    model, guide, x = pair()
    x = x.clone()
    x[7] = torch.nan
    for run in (
        lambda: pv.evaluate(pv.ImportanceSampling(model, guide), x.split(2), progress=False),
        lambda: pv.ELBOSurgery(model, guide)(x.split(2), progress=False),
    ):
        with raises(InvalidDataError, "NaN", "batch 3"):
            run()


def check_dicts_and_generators():
    model, guide, x = pair()
    estimator = pv.ImportanceSampling(model, guide, num_particles=150)
    same_as_one_process(lambda: pv.evaluate(estimator, ({"x": part} for part in x.split(3)), seed=0, progress=False))
