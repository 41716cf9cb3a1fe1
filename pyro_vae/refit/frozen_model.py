"""Which parameters belong to the model and which to the guide, and how the model is frozen in training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import unwrap
from pyro.poutine.guide import GuideMessenger
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..arguments import devices_of
from ..autocast import for_program
from ..errors import OptionError, StructureError, quoted
from ..isolation import eval_mode, modules_of, unseen
from ..objectives import leaves_behind

# Pyro's warning about parameters that are frozen on purpose
NOT_REGISTERED = "was not registered in the param store because requires_grad=False"


class FrozenModel:
    """The parameters and modules of a model and of a guide, found from the dependences of their log-densities.

    Registration does not decide: `pyro.module("vae", self)` in both programs is common, and right. A parameter that the
    model depends on stays frozen, also if the guide depends on it too.

    :ivar of_model: parameters on which log p(x, z) depends.
    :ivar of_guide: parameters on which q and its draws depend, without those of the model.
    :ivar shared: names of parameters on which both depend.
    """

    def __init__(self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self._model, self._guide = model, guide
        self.of_model: set[Tensor] = set()
        self.of_guide: set[Tensor] = set()
        self.shared: set[str] = set()
        self._in_model: set[nn.Module] = set()
        self._in_guide: set[nn.Module] = set()
        self._look = args, kwargs
        self._taken: list[Tensor] | None = None  # parameters whose gradient is switched off while the model is frozen
        self._values = self.learn(args, kwargs)
        first, again = self._densities(), self._densities()
        self._before = first if same(first, again) else None  # a device may add in a different order each time

    def learn(self, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Run both programs once and add the parameters on which they depend; returns the trace of the guide."""
        with self._running(args, kwargs):
            with met_modules(self._in_guide):
                trace = poutine.trace(self._guide).get_trace(*args, **kwargs)
                core = unwrap(self._guide)
                if isinstance(core, GuideMessenger):  # an autoguide runs the model as well
                    trace = core.get_traces()[1]
            of_guide = set(leaves_behind(numbers_of(trace)))
            trace.detach_()
            with met_modules(self._in_model):
                of_model = set(leaves_behind(numbers_of(self._replayed(trace, args, kwargs))))
        self.of_model |= of_model
        self._take_gradients()
        self.shared |= {name_of(param) for param in of_guide & self.of_model}
        self.of_guide = (self.of_guide | of_guide) - self.of_model
        return trace

    @contextmanager
    def held(self) -> Iterator[None]:
        """Parameters of the model have no gradient and its modules are in eval mode; those of the guide are in train mode.

        Everything is restored on exit. Unknown modules run in eval mode.
        """
        self._taken = []
        modes = {module: module.training for module in self._modules()}

        def meet(module: nn.Module, args: Any) -> None:
            if module not in modes:
                modes[module] = module.training
                module.training = False

        hook = register_module_forward_pre_hook(meet)
        try:
            self._take_gradients()
            for module in list(modes):
                module.training = module in self._trained_modules()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", f".*{NOT_REGISTERED}")
                yield
        finally:
            hook.remove()
            for param in self._taken:
                param.requires_grad_(True)
            self._taken = None
            for module, mode in modes.items():
                module.training = mode

    def _take_gradients(self) -> None:
        if self._taken is not None:
            new = [param for param in self.of_model if param.requires_grad]
            self._taken += new
            for param in new:
                param.requires_grad_(False)

    def check_unchanged(self) -> None:
        """Check that log p(x, z) of the first batch at the same latents has not changed in any bit.

        :raises StructureError: where it has changed, as for a model that reads a parameter of the guide without a gradient.
        """
        if self._before is None:
            return
        now = self._densities()
        if not same(self._before, now):
            moved = [name for name in now if not same({"": self._before[name]}, {"": now[name]})]
            raise StructureError(
                f"training the guide has changed the model: the log-densities of its sites {quoted(moved)} are "
                "different now, so the model reads a value of the guide without autograd (detach, .data, a buffer). "
                "The guide has been restored. Give model and guide separate modules"
            )

    def _densities(self) -> dict[str, Tensor]:
        args, kwargs = self._look
        with self._running(args, kwargs):
            torch.manual_seed(0)  # for sites that only the model draws
            trace = self._replayed(self._values, args, kwargs)
            trace.compute_log_prob()
            return {n: site["log_prob"].detach() for n, site in trace.nodes.items() if site["type"] == "sample"}

    def _replayed(self, trace: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        return poutine.trace(poutine.replay(self._model, trace)).get_trace(*args, **kwargs)

    @contextmanager
    def _running(self, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
        programs = self._model, self._guide
        devices = devices_of((args, kwargs), modules_of(*programs))
        with unseen(*programs, devices=devices), for_program(), eval_mode(*programs), torch.enable_grad():
            yield

    def _modules(self) -> set[nn.Module]:
        return {*parts_of(self._model), *parts_of(self._guide), *self._in_model, *self._in_guide}

    def _trained_modules(self) -> set[nn.Module]:
        """The modules that run in the guide and not in the model, and the guide where it is a module."""
        own = parts_of(self._guide) - parts_of(self._model)
        return (self._in_guide | own) - self._in_model


def parts_of(program: Callable) -> set[nn.Module]:
    return {part for top in modules_of(program) for part in top.modules()}


@contextmanager
def met_modules(found: set[nn.Module]) -> Iterator[None]:
    """Add the modules that run inside."""
    hook = register_module_forward_pre_hook(lambda module, args: found.add(module))
    try:
        yield
    finally:
        hook.remove()


def numbers_of(trace: Any) -> list[Tensor]:
    """Log-densities and values of all sites."""
    trace.compute_log_prob()
    sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
    return [number for site in sites for number in (site["log_prob"], site["value"]) if isinstance(number, Tensor)]


def name_of(param: Tensor) -> str:
    return pyro.get_param_store().param_name(param) or f"a parameter of shape {tuple(param.shape)}"


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Equality bit by bit, with NaN equal to NaN."""
    return one.keys() == other.keys() and all(
        one[n].shape == other[n].shape and bool(((one[n] == other[n]) | (one[n].isnan() & other[n].isnan())).all())
        for n in one
    )


def check_trainable(frozen: FrozenModel) -> None:
    if not frozen.of_guide:
        kept = f": {quoted(sorted(frozen.shared))} belong to the model too, and stay frozen" if frozen.shared else ""
        raise OptionError(
            f"the guide has no parameter to train that the model does not use{kept}. Give it a network, or parameters, "
            "that the model does not use"
        )
