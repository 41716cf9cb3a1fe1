"""A minimal replacement for Pyro's trace and replay that skips log-densities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace, unwrap
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape


class Tape(Messenger):
    """Records the sample sites of one run; given the tape of a guide, the model uses the guide's draws.

    :ivar nodes: the sites by name, as in Pyro's `Trace`.
    """

    def __init__(self, guide: Tape | None = None) -> None:
        super().__init__()
        self.guide = guide
        self.nodes: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        drawn = None if self.guide is None or msg["is_observed"] else self.guide.nodes.get(msg["name"])
        if drawn is None:
            return
        if drawn["is_observed"]:
            raise RuntimeError(f"site '{msg['name']}' is latent in the model but observed in the guide")
        msg.update(done=True, value=drawn["value"], infer=drawn["infer"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["infer"] and msg["infer"].get("_do_not_trace"):
            return
        if msg["name"] in self.nodes:
            raise RuntimeError(f"two sample sites of one program are named '{msg['name']}': give each a different name")
        self.nodes[msg["name"]] = msg.copy()

    @classmethod
    def of(cls, trace: Trace) -> Tape:
        tape = cls()
        tape.nodes = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
        return tape

    def forget_subsampling(self) -> None:
        """Drop subsample sites, which are replayed like latents but are not part of the loss."""
        self.nodes = {name: site for name, site in self.nodes.items() if not site_is_subsample(site)}


def tape_pair(
    max_plate_nesting: int, model: Callable, guide: Callable, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tape, Tape]:
    """The model's and the guide's sites, as Pyro's `get_importance_trace`, but without log-densities."""
    if isinstance(unwrap(guide), GuideMessenger):
        guide(*args, **kwargs)
        model_tape, guide_tape = (Tape.of(trace) for trace in unwrap(guide).get_traces())  # type: ignore[attr-defined]
    else:
        with Tape() as guide_tape:
            guide(*args, **kwargs)
        with Tape(guide_tape) as model_tape:
            model(*args, **kwargs)
    for tape in (model_tape, guide_tape):
        tape.forget_subsampling()
    if is_validation_enabled():
        check_model_guide_match(model_tape, guide_tape, max_plate_nesting)
        for site in (*model_tape.nodes.values(), *guide_tape.nodes.values()):
            as_if_scored: Any = {**site, "log_prob": SimpleNamespace(shape=site["fn"].batch_shape)}
            check_site_shape(as_if_scored, max_plate_nesting)
    return model_tape, guide_tape
