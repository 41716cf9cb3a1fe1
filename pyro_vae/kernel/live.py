"""A pair as it is trained: gradients, parameters, buffers, modes and random state of a call are the user's own."""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..errors import BatchCouplingError, DropoutWarning
from . import isolation
from .autoguides import refuse_guide
from .calls import Call
from .pairs import Pair, check_signature, devices_of, signature_of
from .plates import INFER

LAYERS = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)  # that act otherwise in train mode


class LivePair(Pair):
    """A model and guide in training.

    What they look like is found out in a rehearsal, at the first call with arguments of new shapes, and believed from then
    on while parameters move. Batch norm and dropout rest while it lasts.
    """

    def __init__(
        self, model: Callable, guide: Callable, *, datum_plate: str | None = INFER, prior_sites: Collection[str] = ()
    ) -> None:
        super().__init__(model, guide, datum_plate=datum_plate, prior_sites=prior_sites, check_support=False)

    def call(self, args: tuple, kwargs: Mapping[str, Any], indices: dict[str, Tensor] | None = None) -> Call:
        """`indices`, by plate, are those of another call about the same data."""
        modules = isolation.modules_of(self.model, self.guide)
        modes = tuple(m.training for top in modules for m in top.modules())
        # A float is a weight that a loop anneals: other values, the same structure.
        key = (signature_of((args, kwargs), floats=False), modes)
        devices = devices_of((args, kwargs), modules)
        if key not in self._known:
            for name, program in (("model", self.model), ("guide", self.guide)):
                check_signature(name, program, args, kwargs)
            with rehearsal(self.model, self.guide, devices=devices) as layers:
                found = self._rehearse(args, kwargs, devices[0])
            structure, guide_names, model_names, guide_execution, model_execution = found
            if model_execution == "vmap" and layers:
                model_execution = "loop"  # torch.vmap runs neither batch norm nor dropout in train mode
            self._known[key] = structure, guide_names, model_names, guide_execution, model_execution
        guide, model = self._programs(args, kwargs, {} if indices is None else indices, lambda name, fn: fn())
        structure, guide.names, model.names, guide.execution, model.execution = self._known[key]
        guide.layout = model.layout = structure.layout
        call = Call(guide, model, structure, 0, devices[0], check_support=False)
        call.data_checked = call.masks_checked = True
        return call

    def _rehearse(self, args: tuple, kwargs: Mapping[str, Any], device: torch.device) -> Any:
        guide, model = self._programs(args, kwargs, {}, lambda name, fn: fn())
        with torch.no_grad():  # parameters and lazy parts come into being, from the user's random state
            drawn = {n: s.value for n, s in guide.run().items() if not s.is_observed}
            model.run(values=drawn)
        refuse_guide(self.guide, self.datum_plate)
        found = self._find_out(guide, model, seed=0)
        structure, guide.names, model.names, guide.execution, model.execution = found
        call = Call(guide, model, structure, 0, device, check_support=False)
        with torch.no_grad():
            drawn_once = call.draw(1)
            call.weigh(drawn_once, call.score(call.latent_values(drawn_once), 1), 1)  # looks at the masks
        return found


@contextmanager
def rehearsal(*programs: Callable, devices: list[torch.device]) -> Iterator[set[nn.Module]]:
    """Modules rest in evaluation mode, and random state, modes and stored traces are put back; yields the layers that do."""
    resting: dict[nn.Module, None] = {}

    def rest(module: nn.Module, args: Any = None) -> None:
        if module.training:
            if getattr(module, "couples_batch", False):
                raise BatchCouplingError(
                    f"{module} in train mode uses statistics of the batch, so the weight of a datum would depend on its "
                    "neighbours: give it a parameter instead, or train with a Beta*_ELBO"
                )
            resting[module] = None
            module.training = False

    def wake() -> None:
        for module in resting:
            module.training = True
        layers.update(module for module in resting if isinstance(module, LAYERS))

    layers: set[nn.Module] = set()
    torch_validation = torch.distributions.Distribution._validate_args
    with ExitStack() as stack:
        stack.enter_context(pyro.poutine.block())
        stack.callback(torch.distributions.Distribution.set_default_validate_args, torch_validation)
        stack.enter_context(isolation.kept_random_state(devices))
        stack.enter_context(isolation.kept_traces(*programs))
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", DropoutWarning)
        stack.callback(wake)
        stack.callback(register_module_forward_pre_hook(rest).remove)
        for top in isolation.modules_of(*programs):
            for module in top.modules():
                rest(module)
        yield layers
