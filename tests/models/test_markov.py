"""The deep Markov model: judged by a Kalman filter, whatever lies behind the ends of the sequences."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from markov_helpers import F64, Returns, StateSpace, ragged, small_markov
from pair_helpers import SIGMAS, assert_near, quiet
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn
from vae_helpers import assert_all_moved, assert_same, snapshot, svi_of

import pyro_vae as pv
from pyro_vae.errors import ArgumentError, EmptyBatchError, MaskError, OptionError, StructureError
from pyro_vae.models import Concatenated, MarkovVAE

LENGTHS = [6, 4, 4, 2, 1]


@pytest.fixture
def system():
    return StateSpace()


def amortized(system):
    """The model of the system, with a recurrent guide that has learned nothing yet."""
    head = nn.Sequential(nn.Linear(2 + 16, 5), pv.nn.MultivariateNormal())
    vae = MarkovVAE(**system.networks(), encoder=pv.nn.BackwardGRU(3, 16), combiner=Concatenated(head)).double()
    vae.model.requires_grad_(False)
    return vae


# What is right


def test_the_exact_guide_gives_what_the_kalman_filter_gives(system):
    vae, (x, lengths) = system.exact_vae(), ragged(system, LENGTHS)
    estimator = pv.ImportanceSampling(vae.model, vae.guide, num_particles=3, seed=0)
    found = estimator(x, lengths)
    right = system.log_evidences(x, lengths)
    torch.testing.assert_close(found.log_evidence, right, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.elbo, right, rtol=0, atol=1e-10)
    assert [known[-2:] for known in estimator._pair._known.values()] == [("leading", "leading")]


def test_batches_that_are_cut_to_their_longest_sequence_are_worth_the_same(system):
    vae, (x, lengths) = system.exact_vae(), ragged(system, LENGTHS)
    batches = [(x[rows, : lengths[rows].max()], lengths[rows]) for rows in ([4], [1, 3], [0, 2])]
    estimator = pv.ImportanceSampling(vae.model, vae.guide, num_particles=3)
    found = pv.evaluate(estimator, batches, args=tuple, progress=False, seed=0)
    right = system.log_evidences(x, lengths)[[4, 1, 3, 0, 2]]
    torch.testing.assert_close(found.log_evidence, right, rtol=0, atol=1e-10)
    whole = estimator(x, lengths)
    assert torch.equal(found.fingerprint, whole.fingerprint[[4, 1, 3, 0, 2]])


def test_without_lengths_all_steps_count(system):
    vae, (x, lengths) = system.exact_vae(), ragged(system, [4, 4])
    found = pv.ImportanceSampling(vae.model, vae.guide, num_particles=3, seed=0)(x)
    torch.testing.assert_close(found.log_evidence, system.log_evidences(x, lengths), rtol=0, atol=1e-10)


def test_a_guide_learns_and_evidence_is_right_before_and_after(system):
    """Two times five sequences within 4.5 errors of at most .02 nats: false alarms in 7e-5 of seeds."""
    vae, (x, lengths) = amortized(system), ragged(system, LENGTHS)
    right, estimator = system.log_evidences(x, lengths), pv.AdaptiveImportanceSampling
    gaps = []
    for steps in (0, 100):
        data, svi = ragged(system, [6, 5, 4, 3, 2, 1] * 10, seed=2), svi_of(vae, pv.BetaTrace_ELBO())
        for _ in range(steps):
            svi.step(*data)
        with quiet():
            found = estimator(vae.model, vae.guide, num_particles=2000, seed=0)(x, lengths)
        assert_near(found.log_evidence, right, found.std_error, 0.02)
        gaps.append(float((right - found.elbo).mean()))
    assert 0 < gaps[1] < gaps[0] / 10, gaps


@pytest.mark.parametrize("padding", [0.0, 1e30, torch.nan])
@pytest.mark.parametrize("more", [0, 3])
def test_padding_changes_neither_densities_nor_gradients(padding, more):
    vae, (x, lengths) = small_markov(), ragged(StateSpace(), LENGTHS, padding=0.0)
    x = x.float()
    with torch.no_grad():
        drawn = poutine.trace(vae.guide).get_trace(x, lengths)
    real = torch.arange(6) < lengths[:, None]
    other = torch.cat([torch.where(real[..., None], x, padding), torch.full((5, more, 3), padding)], 1)
    results = []
    for data in (x, other):
        vae.zero_grad()
        guide = poutine.trace(poutine.replay(vae.guide, trace=drawn)).get_trace(data, lengths)
        model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(data, lengths)
        loss = model.log_prob_sum() - guide.log_prob_sum()
        loss.backward()
        results.append((loss.detach(), {name: p.grad.clone() for name, p in vae.named_parameters()}))
    (before, gradients), (after, others) = results
    torch.testing.assert_close(after, before)
    assert_same(others, gradients)


def test_an_encoder_of_ones_own_sees_real_steps_in_the_place_of_padding():
    vae, (x, lengths) = small_markov(), ragged(StateSpace(), [3, 1])
    seen = []
    vae.encoder = Returns(lambda x, lengths: seen.append(x) or torch.zeros(2, 3, 8))
    for call in (vae.guide, vae.reconstruct):
        call(x.float(), lengths)
        assert torch.equal(seen[-1][0], x[0].float()) and torch.equal(seen[-1][1], x[1, :1].float().expand(3, 3))


# What runs on it


def test_gaps_units_and_evidence_run_on_sequences_of_unequal_lengths(system):
    """Two times two sequences within 4.5 errors: false alarms in 3e-5 of seeds."""
    vae, (x, lengths) = system.exact_vae(), ragged(system, [3, 2])
    right = system.log_evidences(x, lengths)
    gaps = pv.InferenceGaps(vae.model, vae.guide, num_particles=300, seed=0)(x, lengths)
    auto = pv.AutoEvidence(vae.model, vae.guide, seed=0)(x, lengths)
    assert_near(gaps.log_evidence, right, gaps.std_errors["log_evidence"], 0.03)
    assert_near(auto.log_evidence, right, auto.std_error, 0.03)
    assert gaps.amortization.abs().max() < 0.01
    units = pv.ActiveUnits(vae.model, vae.guide, seed=0)([(x, lengths)], args=tuple, progress=False)
    assert list(units.site_kl) == ["latent_1", "latent_2", "latent_3"]
    assert all(float(estimate.value) > 0 for estimate in units.site_kl.values())


def test_surgery_is_for_sequences_of_one_length(system):
    vae, (x, lengths) = system.exact_vae(), ragged(system, [3, 2])
    surgery = pv.ELBOSurgery(vae.model, vae.guide, seed=0)
    with pytest.raises(MaskError, match="latent_3"):
        surgery([(x, lengths)], args=tuple, progress=False)
    found = surgery([ragged(system, [2] * 60)], args=tuple, progress=False)
    assert float(found.kl.value) == pytest.approx(float(found.mutual_information.value + found.marginal_kl.value))


OBJECTIVES = {
    "BetaTrace": pv.BetaTrace_ELBO,
    "BetaTraceMeanField": pv.BetaTraceMeanField_ELBO,
    "BetaTraceGraph": pv.BetaTraceGraph_ELBO,
    "ImportanceWeighted": lambda: pv.ImportanceWeightedELBO(num_particles=3),
    "vectorized": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
}


@pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES)
def test_objectives_have_the_bound_and_train_every_parameter(system, make):
    if make is not pv.BetaTraceMeanField_ELBO:  # its formulas vary from draw to draw of what comes before
        vae, (x, lengths) = system.exact_vae(), ragged(system, LENGTHS)
        loss = make().loss(vae.model, vae.guide, x, lengths)
        assert float(loss) == pytest.approx(-float(system.log_evidences(x, lengths).sum()))
    vae, x = small_markov(), torch.randn(4, 5, 3)
    before = snapshot(vae)
    svi_of(vae, make()).step(x, torch.tensor([5, 4, 2, 1]))
    assert_all_moved(vae, before)


def test_simulations_have_the_shape_of_the_data():
    vae, x, lengths = small_markov(), torch.randn(4, 5, 3), torch.tensor([5, 4, 2, 1])
    found = pv.simulate(vae.model, x, lengths, seed=0)
    assert found.observed["obs"].shape == (4, 5, 3) and found.latents["latent_5"].shape == (4, 2)
    assert pv.reconstruct(vae.model, vae.guide, x, lengths, seed=0).means["obs"].shape == (4, 5, 3)


LIKELIHOODS = {
    "bits": (pv.nn.Bernoulli(), torch.ones(3, 4, 2)),
    "counts": (pv.nn.NegativeBinomial(), torch.full((3, 4, 2), 3.0)),
    "classes": (pv.nn.Categorical(3), torch.full((3, 4, 2), 2)),
    "positive numbers": (pv.nn.Gamma(), torch.full((3, 4, 2), 0.5)),
}


@pytest.mark.parametrize(("likelihood", "x"), LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_padding_of_zeros_outside_the_support_is_left_alone(likelihood, x):
    vae, lengths = small_markov(), torch.tensor([4, 2, 1])
    first = likelihood.input_layer()
    width = first(x).shape[-1]
    vae.decoder = nn.Sequential(nn.Linear(2, likelihood.num_outputs(2)), likelihood)
    vae.encoder = pv.nn.BackwardGRU(width, 8, first=first)
    x = torch.where((torch.arange(4) < lengths[:, None])[..., None], x, x.new_full((), -7))
    svi_of(vae).step(x, lengths)
    with quiet():
        assert pv.ImportanceSampling(vae.model, vae.guide, num_particles=5, seed=0)(x, lengths).log_evidence.isfinite().all()
    assert vae.generate(2, 3).shape == (2, 3, 2)


# The programs and the object around them


def test_sites_and_densities_are_those_of_the_networks():
    vae, x, lengths = small_markov(), torch.randn(4, 3, 3), torch.tensor([3, 2, 1, 3])
    guide = poutine.trace(vae.guide).get_trace(x, lengths)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x, lengths)
    guide.compute_log_prob(), model.compute_log_prob()
    names = ["data", "latent_1", "latent_2", "latent_3"]
    assert [n for n, s in guide.nodes.items() if s["type"] == "sample"] == names
    assert [n for n, s in model.nodes.items() if s["type"] == "sample"] == [*names, "obs"]
    assert [(f.name, f.size) for f in model.nodes["obs"]["cond_indep_stack"]] == [("data", 4)]
    h, z, fit = vae.encoder(x, lengths), vae.guide.start.expand(4, 2), 0.0
    for t in range(3):
        real, value = t < lengths, guide.nodes[f"latent_{t + 1}"]["value"]
        p = vae.transition(z) if t else vae.initial()
        for trace, fn in ((guide, vae.combiner(z, h[:, t])), (model, p)):
            log_prob = trace.nodes[f"latent_{t + 1}"]["log_prob"]
            torch.testing.assert_close(log_prob, torch.where(real, fn.log_prob(value), 0.0))
        fit = fit + torch.where(real, vae.decode(value).log_prob(x[:, t]), 0.0)
        z = value
    torch.testing.assert_close(model.nodes["obs"]["log_prob"], fit)


def test_generated_sequences_have_the_moments_of_the_model(system):
    """Three steps of three numbers: 9 means and 45 covariances, false alarms in 4e-4 of seeds."""
    vae, n = system.exact_vae(), 20_000
    x = vae.generate(n, 3)
    assert x.shape == (n, 3, 3)
    means, spreads = [torch.zeros(2, dtype=F64)], [system.P]
    for _ in range(2):
        means.append(system.A @ means[-1] + system.a)
        spreads.append(system.A @ spreads[-1] @ system.A.T + system.Q)
    blocks = [[torch.linalg.matrix_power(system.A, max(s - t, 0)) @ spreads[min(s, t)] for t in range(3)] for s in range(3)]
    z = torch.cat(
        [torch.cat([blocks[max(s, t)][min(s, t)] if s >= t else blocks[t][s].T for t in range(3)], 1) for s in range(3)]
    )
    C = torch.block_diag(*[system.C] * 3)
    covariance, mean = C @ z @ C.T + 0.4 * torch.eye(9, dtype=F64), C @ torch.cat(means) + system.c.repeat(3)
    variances = covariance.diagonal()
    assert ((x.flatten(1).mean(0) - mean).abs() < SIGMAS * (variances / n).sqrt()).all()
    error = ((variances[:, None] * variances + covariance.square()) / n).sqrt()
    assert error.max() < 0.1
    assert ((torch.cov(x.flatten(1).T) - covariance).abs() < SIGMAS * error).all()


def test_a_reconstruction_is_the_mean_at_one_draw_and_nothing_in_the_padding():
    vae, x, lengths = small_markov(), torch.randn(4, 3, 3), torch.tensor([3, 2, 1, 3])
    torch.manual_seed(0)
    shown = vae.reconstruct(x, lengths)
    torch.manual_seed(0)
    z, h = vae.guide.start.expand(4, 2), vae.encoder(x, lengths)
    for t in range(3):
        z = vae.combiner(z, h[:, t]).sample()
        real = t < lengths
        torch.testing.assert_close(shown[real, t], vae.decode(z[real]).mean.detach())
        assert shown[~real, t].isnan().all()


def test_networks_in_double_precision_make_a_pair_in_double_precision():
    vae = small_markov().double()
    again = MarkovVAE(vae.initial, vae.transition, vae.decoder, vae.encoder, vae.combiner)
    assert again.guide.start.dtype is F64 and again.reconstruct(torch.randn(2, 3, 3, dtype=F64)).dtype is F64


def test_looking_at_it_leaves_no_trace():
    vae, x = small_markov(), torch.randn(4, 3, 3)
    vae.decoder.insert(0, nn.Dropout(0.5))
    modes = [m.training for m in vae.modules()]
    with poutine.trace() as outer:
        shown = [vae.reconstruct(x), vae.generate(2, 3)]
    assert not any(tensor.requires_grad for tensor in shown)
    assert [m.training for m in vae.modules()] == modes and not outer.trace.nodes and not pyro.get_param_store()


INSTANCES = {
    "a second one": lambda vae: small_markov(),
    "a deep copy": copy.deepcopy,
    "unpickled": lambda vae: pickle.loads(pickle.dumps(vae)),
}


@pytest.mark.parametrize("instance", INSTANCES.values(), ids=INSTANCES)
def test_two_in_one_process_learn_what_each_learns_alone(instance):
    first, args = small_markov(), (torch.randn(4, 3, 3), torch.tensor([3, 2, 1, 3]))
    svi_of(first).step(*args)
    vae, of_first = instance(first), snapshot(first)
    reference, before, svi = copy.deepcopy(vae), snapshot(vae), svi_of(vae)
    torch.manual_seed(0)
    for _ in range(3):
        svi.step(*args)
    assert_all_moved(vae, before)
    assert_same(first.state_dict(), of_first)
    loss = Trace_ELBO()(reference.model, reference.guide)
    optimizers = [torch.optim.Adam([p], lr=0.02) for p in loss.parameters()]
    torch.manual_seed(0)
    for _ in range(3):
        reference.zero_grad()
        loss(*args).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert_same(vae.state_dict(), reference.state_dict())


def test_the_parts_are_seen_and_can_be_replaced():
    vae = small_markov()
    for name in ("initial", "transition", "decoder", "encoder", "combiner"):
        assert f"({name}): " in repr(vae)
        new = copy.deepcopy(getattr(vae, name))
        setattr(vae, name, new)
        owner = vae.guide if name in ("encoder", "combiner") else vae.model
        assert getattr(vae, name) is getattr(owner, name) is new
    assert set(dict(vae.named_children())) == {"model", "guide"}
    other = small_markov()
    other.load_state_dict(vae.state_dict())
    torch.manual_seed(0)
    drawn = vae.generate(2, 3)
    torch.manual_seed(0)
    assert torch.equal(other.generate(2, 3), drawn)


# What is refused


WRONG_LENGTHS = {
    "none left": (torch.tensor([3, 0, 1, 2]), "between 1 and the 3 steps of x, got 0 to 3"),
    "longer than x": (torch.tensor([3, 4, 1, 2]), "between 1 and the 3 steps of x, got 1 to 4"),
    "floats": (torch.ones(4), "whole numbers"),
    "a mask": (torch.ones(4, dtype=torch.bool), "whole numbers"),
    "of other sequences": (torch.ones(3, dtype=torch.long), r"one per sequence, \(4,\), got a tensor of int64 \(3,\)"),
    "a list": ([3, 2, 1, 3], r"torch.tensor\(\["),
}


@pytest.mark.parametrize(("lengths", "message"), WRONG_LENGTHS.values(), ids=WRONG_LENGTHS)
def test_lengths_are_whole_numbers_of_real_steps(lengths, message):
    vae, x = small_markov(), torch.randn(4, 3, 3)
    for call in (vae.model, vae.guide, vae.reconstruct, pv.ImportanceSampling(vae.model, vae.guide, seed=0)):
        with pytest.raises(ArgumentError, match=message):
            call(x, lengths)


WRONG_DATA = {
    "no steps": (torch.zeros(4, 0, 3), ArgumentError, "at least one step"),
    "plain numbers": (torch.zeros(4, 3), ArgumentError, r"\(B, T, 1\)"),
    "no rows": (torch.zeros(0, 3, 3), EmptyBatchError, "at least one row"),
    "nothing": (None, ArgumentError, "x must be a tensor"),
    "other steps": (torch.zeros(4, 3, 2), ArgumentError, "floating-point numbers"),
}


@pytest.mark.parametrize(("x", "error", "message"), WRONG_DATA.values(), ids=WRONG_DATA)
def test_data_are_sequences(x, error, message):
    vae = small_markov()
    for call in (svi_of(vae).step, vae.reconstruct):
        with pytest.raises(error, match=message):
            call(x)


WRONG_NETWORKS = {
    "state of another size": ("transition", lambda z: dist.Normal(z[..., :1], 1.0).to_event(1), r"\(2,\), got \(1,\)"),
    "state without an event": ("transition", lambda z: dist.Normal(z, 1.0), r"the transition must return.*got \(\)"),
    "rows that are mixed": (
        "transition",
        lambda z: dist.Normal(z.mean(0, True), 1.0).to_event(1),
        "one distribution per row",
    ),
    "combiner of another size": ("combiner", lambda z, h: dist.Normal(z[..., :1], 1.0).to_event(1), r"\(2,\), got \(1,\)"),
    "no distribution": ("combiner", lambda z, h: z, "the combiner must return a distribution"),
    "features of the last step": ("encoder", lambda x, lengths: x[:, 0], r"features \(B, T, H\).*got a tensor"),
    "steps as one event": ("decoder", lambda z: dist.Normal(z, 1.0).to_event(2), "the decoder must return one"),
    "data of another shape": ("decoder", lambda z: dist.Normal(z, 1.0).to_event(1), r"the steps of x.*\(2,\), got \(3,\)"),
}


@pytest.mark.parametrize(("role", "function", "message"), WRONG_NETWORKS.values(), ids=WRONG_NETWORKS)
def test_networks_return_what_the_programs_need(role, function, message):
    vae = small_markov()
    setattr(vae, role, Returns(function))
    with pytest.raises((StructureError, ArgumentError), match=message):
        svi_of(vae).step(torch.randn(4, 3, 3))


def test_parts_are_modules_and_states_are_vectors():
    vae = small_markov()
    parts = {name: getattr(vae, name) for name in ("initial", "transition", "decoder", "encoder", "combiner")}
    for role in parts:
        with pytest.raises(OptionError, match=f"the {role} must be an nn.Module"):
            MarkovVAE(**{**parts, role: None})
    with pytest.raises(StructureError, match=r"event shape \(D,\), got \(\)"):
        MarkovVAE(**{**parts, "initial": Returns(lambda: dist.Normal(torch.zeros(2), 1.0))})
    for n, steps in ((0, 3), (2, 0)):
        with pytest.raises(OptionError, match="must be a whole number of at least 1"):
            vae.generate(n, steps)
