"""The semi-supervised VAE: log p(x, y) and log p(x) by closed forms and sums, the ELBO by hand, learning, and refusals."""

import copy
import functools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pair_helpers import F64, SIGMAS, assert_near, quiet
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from vae_helpers import LEARNING_RATE, assert_all_moved, assert_same, snapshot

import pyro_vae as pv
from pyro_vae.errors import (
    AuxiliarySiteError,
    EmptyBatchError,
    EnumerationError,
    OptionError,
    ProgramError,
    StructureError,
    SupportError,
)
from pyro_vae.models import Concatenated, SemiSupervisedVAE

C, X, D, S2 = 3, 5, 2, 0.4
PROBS = (0.25, 0.125, 0.625)  # exact in float32
Y = torch.tensor([0, 1, 2, -1, -1, 2, -1, 0])
LABELS = {"some known": Y, "all known": Y.clamp(min=1), "none known": torch.full_like(Y, -1), "no labels": None}
LOSSES = {"Pyro's": TraceEnum_ELBO, "ours": pv.BetaTraceEnum_ELBO}
labels = pytest.mark.parametrize("y", LABELS.values(), ids=LABELS)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def data():
    return 1.5 * numbers(len(Y), X, seed=1)


def right(each, y):
    """log p(x, y) where the label is known, log p(x) elsewhere, from log p(x, y) of all classes, (B, C)."""
    summed = each.logsumexp(-1)
    return summed if y is None else torch.where(y >= 0, each.gather(-1, y.clamp(min=0)[:, None])[:, 0], summed)


def linear_gaussian(class_probs=PROBS, off=0.0, **options):
    """z ~ N(0, I), x ~ N(W_y z + v_y, s^2 I), and log p(x, y) of all classes. The guide is the posterior, moved by `off`."""
    weight, shift = numbers(C, X, D), numbers(C, X, seed=2)
    log_p = torch.tensor(class_probs or [1 / C] * C, dtype=F64).log()
    covariance = torch.linalg.inv(torch.eye(D, dtype=F64) + weight.mT @ weight / S2)
    gain, root = covariance @ weight.mT / S2, torch.linalg.cholesky(covariance)

    def each(x):
        marginal = weight @ weight.mT + S2 * torch.eye(X, dtype=F64)
        return torch.distributions.MultivariateNormal(shift, marginal).log_prob(x[:, None]) + log_p

    def decode(z, y):
        mean = torch.einsum("...c,cxd,...d->...x", y, weight, z) + y @ shift
        return dist.Normal(mean, S2**0.5).to_event(1)

    def encode(x, y):
        mean = torch.einsum("...c,cdx,...x->...d", y, gain, x - y @ shift)
        return dist.MultivariateNormal(mean + off, scale_tril=torch.einsum("...c,cde->...de", y, root))

    classify = Function(lambda x: each(x) + off * torch.arange(C))
    prior = pv.nn.StandardNormal(D)
    vae = SemiSupervisedVAE(
        classify, Function(encode), Function(decode), prior, C, class_probs=class_probs, **options
    ).double()
    return vae, each


def small_vae(**options):
    return SemiSupervisedVAE(
        nn.Sequential(nn.Linear(X, 8), nn.Tanh(), nn.Linear(8, C)),
        Concatenated(nn.Sequential(nn.Linear(X + C, 2 * D), pv.nn.Normal())),
        Concatenated(nn.Sequential(nn.Linear(D + C, X), pv.nn.Normal(0.5))),
        pv.nn.StandardNormal(D),
        C,
        **options,
    )


def small_data():
    return data().float()


# ------------------------------------------------------------------ numbers


@labels
@pytest.mark.parametrize("probs", [None, PROBS], ids=["uniform", "uneven"])
def test_with_the_exact_guide_every_draw_gives_the_evidence(y, probs):
    vae, each = linear_gaussian(probs, alpha=0.0)
    args = (data(),) if y is None else (data(), y)
    truth = right(each(data()), y)
    evidence = pv.ImportanceSampling(vae.model, vae.guide, num_particles=3, seed=0)(*args)
    torch.testing.assert_close(evidence.log_evidence, truth, rtol=0, atol=1e-10)
    assert not evidence.looped
    for loss in LOSSES.values():
        assert loss(max_plate_nesting=1).loss(vae.model, vae.guide, *args) == pytest.approx(-float(truth.sum()), abs=1e-9)
        several = loss(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
        assert several.loss(vae.model, vae.guide, *args) == pytest.approx(-float(truth.sum()), abs=1e-9)
    loader = DataLoader(TensorDataset(*args), batch_size=3)
    whole = pv.evaluate(pv.ImportanceSampling(vae.model, vae.guide, num_particles=3), loader, args=tuple, progress=False)
    torch.testing.assert_close(whole.log_evidence, truth, rtol=0, atol=1e-10)


ESTIMATORS = {
    "AutoEvidence": functools.partial(pv.AutoEvidence, seed=0),
    "AdaptiveImportanceSampling": functools.partial(pv.AdaptiveImportanceSampling, num_particles=1000, seed=0),
}


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@labels
def test_with_a_wrong_guide_the_evidence_lies_within_its_error(estimator, y):
    """8 data: false alarms in 6e-5 of seeds."""
    vae, each = linear_gaussian(off=0.5)
    with quiet():
        found = estimator(vae.model, vae.guide)(data(), y)
    assert_near(found.log_evidence, right(each(data()), y), found.std_error, 0.1)


def test_the_gap_is_that_of_the_closed_form():
    """KL of two normals with one covariance; without a label KL of the classes, and the mean of it. False alarms: 1e-4."""
    off = 0.5
    vae, each = linear_gaussian(off=off)
    weight = numbers(C, X, D)
    precision = torch.eye(D, dtype=F64) + weight.mT @ weight / S2
    of_z = 0.5 * off**2 * precision.sum((1, 2))
    log_p = each(data()).log_softmax(-1)
    log_q = (log_p + off * torch.arange(C)).log_softmax(-1)
    unlabelled = (log_q.exp() * (log_q - log_p + of_z)).sum(-1)
    kl = torch.where(Y >= 0, of_z[Y], unlabelled)
    with quiet():
        gaps = pv.InferenceGaps(vae.model, vae.guide, num_particles=1000, seed=0)(data(), Y)
    assert_near(gaps.elbo, right(each(data()), Y) - kl, gaps.std_errors["elbo"], 0.1)
    assert_near(gaps.inference, kl, gaps.std_errors["inference"], 0.1)


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_a_decoder_that_is_not_linear_equals_sums_over_classes_and_a_grid(estimator):
    """Bernoulli data, one latent. 8 data: false alarms in 6e-5 of seeds."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(1 + C, 8), nn.Tanh(), nn.Linear(8, X), pv.nn.Bernoulli())
    encoder = nn.Sequential(nn.Linear(X + C, 2), pv.nn.Normal())
    vae = SemiSupervisedVAE(
        nn.Linear(X, C), Concatenated(encoder), Concatenated(decoder), pv.nn.StandardNormal(1), C
    ).double()
    x, z = (data() > 0).double(), torch.linspace(-9, 9, 2001, dtype=F64)
    with torch.no_grad():
        decoder[2].weight.mul_(3)
        at = decoder(torch.cat([z.expand(C, -1)[..., None], torch.eye(C, dtype=F64)[:, None].expand(C, 2001, C)], -1))
        log_joint = at.log_prob(x[:, None, None]) + dist.Normal(0.0, 1.0).log_prob(z)  # (B, C, grid)
    each = log_joint.logsumexp(-1) + math.log(18 / 2000) - math.log(C)
    with quiet():
        found = estimator(vae.model, vae.guide)(x, Y)
    assert_near(found.log_evidence, right(each, Y), found.std_error, 0.1)


@pytest.mark.parametrize("alpha", [0.0, 2.5])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_loss_and_its_gradient_are_the_definition_summed_by_hand(loss, alpha):
    """On the same noise: L(x, y), L(x, y) - log q(y given x) summed under q, and alpha log q(y given x) of the labels."""
    vae, x = small_vae(alpha=alpha, class_probs=PROBS).double(), data()
    torch.manual_seed(7)
    found = loss(max_plate_nesting=1).loss_and_grads(vae.model, vae.guide, x, Y)
    gradients = {name: p.grad.clone() for name, p in vae.named_parameters()}

    vae.zero_grad()
    known, log_q = Y >= 0, vae.classifier(x).log_softmax(-1).T
    y = torch.where(known, Y, torch.arange(C)[:, None])  # (C, B)
    one_hot = torch.eye(C, dtype=F64)[y]
    torch.manual_seed(7)
    q = vae.encoder(x, one_hot)
    z = q.rsample()
    bound = vae.decoder(z, one_hot).log_prob(x) + vae.prior().log_prob(z) - q.log_prob(z) + torch.tensor(PROBS).log()[y]
    of_known, of_unknown = bound.mean(0), (log_q.exp() * (bound - log_q)).sum(0)
    loss_of_classification = -log_q.T[known].gather(-1, Y[known][:, None]).sum()
    by_hand = -torch.where(known, of_known, of_unknown).sum() + alpha * loss_of_classification
    by_hand.backward()
    assert found == pytest.approx(by_hand.item(), rel=1e-6)
    for name, p in vae.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-6, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")


def test_the_loss_of_classification_is_in_the_loss_alone():
    x, terms, found = data(), {}, {}
    for alpha in (0.0, 2.5):
        torch.manual_seed(0)
        vae, objective = small_vae(alpha=alpha).double(), pv.BetaTraceEnum_ELBO(max_plate_nesting=1)
        torch.manual_seed(0)
        objective.loss(vae.model, vae.guide, x, Y)
        terms[alpha] = objective.terms
        with quiet():
            found[alpha] = pv.ImportanceSampling(vae.model, vae.guide, num_particles=200, seed=0)(x, Y)
    expected = -vae.classify(x).log_prob(Y.clamp(min=0))[Y >= 0].sum()
    assert float(terms[2.5].loss - terms[0.0].loss) == pytest.approx(2.5 * expected.item(), rel=1e-6)
    assert float(terms[2.5].elbo) == pytest.approx(float(terms[0.0].elbo), rel=1e-12)
    assert torch.equal(found[2.5].log_evidence, found[0.0].log_evidence)
    assert (found[2.5].left_out, found[0.0].left_out) == (("classification",), ())


def test_the_posterior_of_the_label_is_that_of_bayes():
    """p(y given x) of unknown labels; 15 numbers, false alarms in 1e-4 of seeds."""
    vae, each = linear_gaussian(off=0.5)
    vae.classifier = nn.Linear(X, C).double()
    unknown = Y < 0
    with quiet():
        found = pv.PosteriorExpectation(
            vae.model, vae.guide, lambda latents: nn.functional.one_hot(latents["y"], C).double(), num_particles=1000, seed=0
        )(data(), Y)
    truth = each(data()).softmax(-1)[unknown]
    assert_near(found.value[unknown].flatten(), truth.flatten(), found.std_error[unknown].flatten(), 0.05)


def test_importance_weighted_training_takes_a_pair_that_draws_the_label():
    """What the two refusals name, done one after the other."""
    vae, each = linear_gaussian()
    objective = pv.ImportanceWeightedELBO(num_particles=3)
    with pytest.raises(AuxiliarySiteError, match=r"poutine.block\(guide, hide=\['classification'\]\)"):
        objective.loss(vae.model, vae.guide, data(), Y)
    guide = poutine.block(vae.guide, hide=["classification"])
    with pytest.raises(EnumerationError, match="or let the guide draw it"):
        objective.loss(vae.model, guide, data(), Y)
    drawing = poutine.infer_config(guide, config_fn=lambda site: {"enumerate": None})
    truth = float(right(each(data()), Y).sum())
    assert objective.loss(vae.model, drawing, data(), Y) == pytest.approx(-truth, abs=1e-9)


def test_analyses_of_the_latents_and_simulated_data():
    vae, _ = linear_gaussian(None)
    loader = [(data(), Y)]
    with quiet():
        units = pv.ActiveUnits(vae.model, vae.guide, seed=0)(loader, args=tuple, progress=False)
        surgery = pv.ELBOSurgery(vae.model, vae.guide, seed=0)(loader, args=tuple, progress=False)
        check = pv.SelfCheck(vae.model, vae.guide, seed=0)(data(), Y)
    assert len(units.names) == D and surgery.num_data == len(Y)
    assert bool(check.evidence.log_evidence.isfinite().all())
    drawn = pv.simulate(vae.model, data(), Y, seed=0).observed["label"]
    assert torch.equal(drawn < 0, Y < 0) and int(drawn.max()) < C


# ------------------------------------------------------------------ learning


def svi_of(vae):
    return SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), pv.BetaTraceEnum_ELBO(max_plate_nesting=1))


COPIES = {
    "a deep copy": copy.deepcopy,
    "unpickled": lambda vae: pickle.loads(pickle.dumps(vae)),
    "with the same state": lambda vae: loaded(vae.state_dict()),
}


def loaded(state):
    vae = small_vae()
    vae.load_state_dict(state)
    return vae


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("way", ["SVI", "torch.optim"])
def test_copies_and_second_ones_learn_every_parameter_by_themselves(way, copied):
    first, x = small_vae(), small_data()
    svi_of(first).step(x, Y)
    second, both = small_vae(), []
    of_first, of_second = snapshot(first), snapshot(second)
    for vae in (copied(first), first):
        before = snapshot(vae)
        torch.manual_seed(0)
        if way == "SVI":
            svi_of(vae).step(x, Y)
        else:
            objective = TraceEnum_ELBO(max_plate_nesting=1)(vae.model, vae.guide)
            optimizer = torch.optim.Adam(objective.parameters(), lr=LEARNING_RATE)
            objective(x, Y).backward()
            optimizer.step()
        assert_all_moved(vae, before)
        both.append(snapshot(vae))
        if vae is not first:
            assert_same(first.state_dict(), of_first)
    assert_same(*both)
    svi_of(second).step(x, Y)
    assert_all_moved(second, of_second)
    assert_same(first.state_dict(), both[1])


def test_the_loss_of_classification_trains_the_classifier_on_labels_and_the_bound_takes_it_from_there():
    """Three clusters whose corners are their names; 300 data, two of each with a label."""
    torch.manual_seed(0)
    truth = torch.arange(300) % C
    x = 3 * torch.eye(C, X)[truth] + 0.5 * torch.randn(300, X)
    y = torch.where(torch.arange(300) < 2 * C, truth, -1)
    vae = small_vae(alpha=5.0)
    svi = svi_of(vae)
    for _ in range(60):
        svi.step(x[: 2 * C], y[: 2 * C])
    assert float((vae.classify(x).probs.argmax(-1) == truth).float().mean()) > 0.9
    first, *_, last = [svi.step(x, y) for _ in range(30)]
    assert last < 0.9 * first


# ------------------------------------------------------------------ the object


def test_its_parts_stand_in_its_repr_and_each_tensor_in_its_state_once():
    vae = small_vae(alpha=0.5)
    text = repr(vae)
    for part in ("SemiSupervisedVAE", "(classifier)", "(encoder)", "(decoder)", "(prior)", "num_classes=3, alpha=0.5"):
        assert text.count(part) == 1, part
    assert list(vae.state_dict()) == [
        "model.class_probs",
        "model.decoder.network.0.weight",
        "model.decoder.network.0.bias",
        "model.prior.loc",
        "model.prior.scale",
        "guide.classifier.0.weight",
        "guide.classifier.0.bias",
        "guide.classifier.2.weight",
        "guide.classifier.2.bias",
        "guide.encoder.network.0.weight",
        "guide.encoder.network.0.bias",
    ]
    for role in ("classifier", "encoder", "decoder", "prior"):
        new = copy.deepcopy(getattr(vae, role))
        setattr(vae, role, new)
        assert getattr(vae, role) is new
    assert set(dict(vae.named_children())) == {"model", "guide"}


def test_looks_at_the_data_of_each_class():
    vae, x, y = small_vae(), small_data(), Y.clamp(min=0)
    one_hot = torch.eye(C)[y]
    torch.testing.assert_close(vae.classify(x).probs, vae.classifier(x).softmax(-1))
    torch.testing.assert_close(vae.encode(x, y).mean, vae.encoder(x, one_hot).mean)
    z = torch.randn(4, len(Y), D)
    torch.testing.assert_close(vae.decode(z, y).mean, vae.decoder(z, one_hot).mean)
    assert vae.decode(z, y).batch_shape == (4, len(Y)) and vae.encode(x, y.int()).event_shape == (D,)
    torch.manual_seed(0)
    shown = vae.reconstruct(x, y)
    torch.manual_seed(0)
    vae.classify(x).sample()
    torch.testing.assert_close(shown, vae.decode(vae.encode(x, y).sample(), y).mean.detach())
    assert vae.reconstruct(x).shape == vae.reconstruct(x, Y).shape == vae.generate(Y).shape == x.shape
    assert not vae.generate(y).requires_grad and not pyro.get_param_store()
    with pytest.raises(EmptyBatchError):
        vae.generate(y[:0])


def test_generated_data_are_of_their_class_or_of_one_drawn_from_its_probability():
    """x of class c is c, to a hundredth. 4000 draws: three proportions, false alarms in 2e-5 of seeds."""
    decoder = Function(lambda z, y: dist.Normal(y @ torch.arange(3.0)[:, None] + 0 * z, 0.001).to_event(1))
    vae = SemiSupervisedVAE(nn.Linear(1, C), nn.Identity(), decoder, pv.nn.StandardNormal(1), C, class_probs=PROBS)
    assert vae.generate(torch.tensor([2, 0, 1])).round().flatten().tolist() == [2, 0, 1]
    y = torch.tensor([-1, 1]).repeat(4000)
    found = vae.generate(y).round().long().flatten()
    assert bool((found[1::2] == 1).all())
    counts, probs = torch.bincount(found[::2], minlength=C), torch.tensor(PROBS)
    assert ((counts - 4000 * probs).abs() < SIGMAS * (4000 * probs * (1 - probs)).sqrt()).all()


# ------------------------------------------------------------------ refusals

WRONG = {
    "floats": (Y.double(), r"a tensor \(8,\) with -1 where a label is unknown, got a tensor of float64 \(8,\): pass y.long"),
    "one-hot": (nn.functional.one_hot(Y.clamp(min=0)), r"got a tensor of int64 \(8, 3\).*of one-hot labels y.argmax"),
    "too few": (Y[:7], r"labels of 8 data.*got a tensor of int64 \(7,\)"),
    "a column": (Y[:, None], r"got a tensor of int64 \(8, 1\)"),
    "truth values": (Y > 0, r"got a tensor of bool \(8,\)"),
    "a list": (Y.tolist(), r"got \[0, 1, 2.*a list"),
    "from 1 on": (
        Y + 1,
        r"from 0 to 2, and -1 where unknown, but 2 of 8 are not, in data \[2, 5\] \(0 to 3\): number",
    ),
    "another mark": (Y.where(Y >= 0, -100), r"but 3 of 8 are not, in data \[3, 4, 6\] \(-100 to 2\)"),
}


@pytest.mark.parametrize(("y", "message"), WRONG.values(), ids=WRONG)
def test_labels_of_another_kind_are_refused(y, message):
    vae, x = small_vae(), small_data()
    for loss in LOSSES.values():
        with pytest.raises((ValueError, ProgramError), match=message):
            loss(max_plate_nesting=1).loss(vae.model, vae.guide, x, y)
    with pytest.raises(ValueError, match="label"):
        pv.ImportanceSampling(vae.model, vae.guide, num_particles=5, seed=0)(x, y)
    with pytest.raises(ValueError, match="label"):
        vae.encode(x, y)
    with pytest.raises(ValueError, match="label"):
        vae.reconstruct(x, y)


def test_an_unknown_label_cannot_be_encoded_or_decoded():
    vae, x = small_vae(), small_data()
    for call in (lambda y: vae.encode(x, y), lambda y: vae.decode(torch.zeros(8, D), y)):
        with pytest.raises(SupportError, match=r"all known here, but 3 of 8 are not, in data \[3, 4, 6\].*argmax\(-1\)"):
            call(Y)
        assert call(torch.where(Y >= 0, Y, vae.classify(x).probs.argmax(-1))).batch_shape == (8,)
    with pytest.raises(ValueError, match=r"z must have a row for each datum, .*got a tensor of float32 \(2,\)"):
        vae.decode(torch.zeros(D), Y[:1])


@pytest.mark.parametrize(
    ("network", "found"),
    [
        (nn.Linear(X, C + 1), r"a tensor of float32 \(8, 4\)"),
        (nn.Sequential(nn.Linear(X, C), pv.nn.Categorical(C)), "a Check"),
    ],
    ids=["too many", "a distribution"],
)
def test_a_classifier_without_a_number_for_each_class_is_refused(network, found):
    vae = small_vae()
    vae.classifier = network
    message = rf"number for each class, a tensor of floats \(8, 3\), got .*{found}.*end it with nn.Linear\(width, 3\)"
    for call in (vae.classify, lambda x: svi_of(vae).step(x, Y)):
        with pytest.raises(StructureError, match=message):
            call(small_data())


def test_networks_that_forget_a_dimension_are_refused():
    vae = small_vae()
    vae.decoder = Function(lambda z, y: dist.Normal(torch.zeros(len(Y), X), 1.0).to_event(1))
    with pytest.raises(StructureError, match=r"the decoder must return one distribution per row, batch shape \(3, 8\)"):
        svi_of(vae).step(small_data(), Y)
    vae = small_vae()
    vae.encoder = Function(lambda x, y: dist.Normal(torch.zeros(D), 1.0).to_event(1))
    with pytest.raises(
        StructureError, match=r"the encoder must return one distribution per row, batch shape \(3, 8\) or \(8,\)"
    ):
        svi_of(vae).step(small_data(), Y)
    vae.encoder = Function(lambda x, y: dist.Normal(x[:, :D], 1.0).to_event(1))  # one that looks at x alone
    assert math.isfinite(svi_of(vae).step(small_data(), Y))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes must be a whole number of at least 2"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"alpha": math.nan}, "alpha must be"),
        ({"class_probs": (0.5, 0.5)}, r"3 positive numbers whose sum is one, got .*pass counts / counts.sum\(\)"),
        ({"class_probs": (0.5, 0.5, 0.0)}, "3 positive numbers"),
        ({"class_probs": torch.tensor([5, 3, 2])}, "3 positive numbers"),
        ({"class_probs": "uniform"}, "3 positive numbers"),
        ({"classifier": lambda x: x}, "the classifier must be an nn.Module"),
        ({"prior": None}, "the prior must be an nn.Module"),
    ],
    ids=lambda given: ", ".join(given) if isinstance(given, dict) else "",
)
def test_options_that_are_none_are_refused(options, message):
    vae = small_vae()
    given = {name: getattr(vae, name) for name in ("classifier", "encoder", "decoder", "prior")} | {"num_classes": C}
    with pytest.raises(OptionError, match=message):
        SemiSupervisedVAE(**{**given, **options})
    counts = torch.tensor([5, 3, 2])
    assert SemiSupervisedVAE(**given, class_probs=counts / counts.sum()).model.class_probs.tolist() == pytest.approx(
        [0.5, 0.3, 0.2]
    )
