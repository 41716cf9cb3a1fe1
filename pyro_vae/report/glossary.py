"""The terms on the page: each with a sentence, and with links to it from the text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Term:
    """One entry of the glossary.

    :ivar anchor: its id on the page; where the glossary of the documentation has the term, the same as there.
    :ivar name: as it is written in the glossary.
    :ivar meaning: one or two sentences.
    :ivar words: what is linked to it in other texts.
    """

    anchor: str
    name: str
    meaning: str
    words: tuple[str, ...]


TERMS = (
    Term("datum", "datum", "One data point, such as one image. Most numbers on this page are means over data.", ()),
    Term("nats", "nats", "The unit of a natural logarithm of a probability. 1 nat is 1.44 bits.", ("nats",)),
    Term(
        "elbo",
        "ELBO",
        "The evidence lower bound: the mean over draws of the guide of log p(x, z) - log q(z | x). Training raises it.",
        ("ELBO",),
    ),
    Term(
        "evidence",
        "log p(x), evidence",
        "The log-probability that the model gives a datum x, with the latents z integrated out. It is estimated from below.",
        ("log p(x)",),
    ),
    Term("guide", "guide", "The approximate posterior q(z | x). Its encoder computes q from x.", ("guide",)),
    Term(
        "q-star",
        "optimal ELBO, q*",
        "The ELBO of q*, the best member of the guide's family for a datum, fitted to that datum alone.",
        ("optimal ELBO", "q*"),
    ),
    Term(
        "amortization-gap",
        "amortization gap",
        "Optimal ELBO minus ELBO: the loss because one encoder serves all data.",
        ("amortization gap", "amortization"),
    ),
    Term(
        "approximation-gap",
        "approximation gap",
        "log p(x) minus optimal ELBO: the loss because the guide's family cannot match the posterior.",
        ("approximation gap", "approximation"),
    ),
    Term("inference-gap", "inference gap", "log p(x) minus ELBO: the sum of these two gaps.", ("inference gap",)),
    Term(
        "monte-carlo-error",
        "Monte Carlo error",
        "The error of a number for these data: how far another seed would move it.",
        ("Monte Carlo error",),
    ),
    Term(
        "sampling-error",
        "sampling error",
        "The error of a number as a statement about all such data: how far other data of the same size would move it.",
        ("sampling errors", "sampling error"),
    ),
    Term(
        "importance-weights",
        "importance weights",
        "p(x, z) / q(z | x) at draws z of q. Their mean estimates p(x).",
        ("importance weights", "weights"),
    ),
    Term(
        "pareto-k",
        "Pareto k",
        "How heavy the tail of the importance weights is. Above its threshold, at most 0.7, log p(x) is likely too low: "
        "the datum is in doubt for its tails.",
        ("Pareto k", "tails"),
    ),
    Term(
        "ess",
        "ESS",
        "Effective sample size: how many equal weights would be as informative as these.",
        ("ESS",),
    ),
    Term(
        "doubts",
        "data in doubt",
        "Data for which a check found that a number may be wrong by more than its error.",
        ("Data in doubt", "data in doubt", "in doubt"),
    ),
    Term(
        "self-check",
        "self-check",
        "The estimate of log p(x), tried on data simulated from the model, where log p(x) also has an upper bound. The "
        "estimate should lie between the two bounds, the sandwich.",
        ("bounds of log p(x)", "sandwich", "self-check", "bias"),
    ),
    Term(
        "calibration",
        "calibration",
        "A test of the guide on data simulated from the model, whose true latents are known. For a right guide the rank of "
        "the true latent among its draws is uniform, and 90% of its 90% intervals contain the true latent.",
        ("calibrated", "calibration"),
    ),
    Term(
        "symmetric-gap",
        "symmetric gap",
        "KL of posterior to guide plus KL of guide to posterior, on simulated data. Zero only for a right guide.",
        ("symmetric gap",),
    ),
    Term(
        "rate-and-distortion",
        "KL to the prior (rate)",
        "The mean KL of q(z | x) to the prior. It is the price of the latents in the ELBO.",
        ("KL to the prior",),
    ),
    Term(
        "mutual-information",
        "mutual information",
        "How many nats the latents carry about which datum they came from: at most log N for N data.",
        ("mutual information",),
    ),
    Term("q-z", "q(z)", "The aggregated posterior: the mean of q(z | x) over the training data.", ("q(z)",)),
    Term("total-correlation", "total correlation", "How dependent the units are under q(z).", ("total correlation",)),
    Term(
        "dimension-wise-kl",
        "dimension-wise KL",
        "The sum over units of the KL of q(z) of this unit to its prior.",
        ("dimension-wise KL",),
    ),
    Term(
        "units",
        "units, active",
        "A unit is one number of a latent. It is active if the variance of its posterior mean over the data is above 0.01.",
        ("active units", "units", "active", "variance of means"),
    ),
    Term(
        "posterior-collapse",
        "posterior collapse",
        "The guide gives the prior for every datum, so that the latents carry no information.",
        ("collapsed",),
    ),
    Term(
        "sharpness",
        "sharpness",
        "The variance of the Laplacian of an image. Blurred images have little.",
        ("sharpness",),
    ),
    Term(
        "decoder-evaluations",
        "decoder evaluations",
        "The unit of cost: the model run once for one datum. A gradient counts as three.",
        ("decoder evaluations",),
    ),
)
ANCHORS = {word: term.anchor for term in TERMS for word in term.words}
WORDS = re.compile("(?<![\\w-])(" + "|".join(map(re.escape, sorted(ANCHORS, key=len, reverse=True))) + ")(?!\\w)")
CALLS = re.compile(r"((?:\b\w+=)?\bpv\.\w+(?:\.\w+)*(?:\((?:[^()]|\([^()]*\))*\)(?:\.\w+)?)?|\b\w+=[\w.]*\w)")


def linked(text: str) -> str:
    """Plain text as HTML: escaped, with a link at the first place of each term, and calls as code."""
    linked_to: set[str] = set()

    def link(match: re.Match[str]) -> str:
        anchor = ANCHORS[match[0]]
        if anchor in linked_to:
            return match[0]
        linked_to.add(anchor)
        return f'<a href="#{anchor}">{match[0]}</a>'

    parts = CALLS.split(escape(text))  # every other one is a call
    html = [f"<code>{part}</code>" if place % 2 else WORDS.sub(link, part) for place, part in enumerate(parts)]
    return "".join(html)
