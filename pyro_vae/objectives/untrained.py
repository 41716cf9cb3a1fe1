"""Detects parameters that a loss depends on but that were created after the optimiser and so are not trained."""

from __future__ import annotations

import warnings

import pyro
from torch import Tensor, nn

from ..errors import UntrainedParameterWarning, quoted
from .gradients import leaves_behind


class UntrainedWatch:
    """Checks for such parameters until an optimiser has changed the other parameters.

    They are created in the first call: parameters of autoguides and lazy layers, which are added to the module, and those of
    `pyro.param` in programs that are not a `PyroModule`, which are in Pyro's store only.
    """

    def __init__(self, module: nn.Module) -> None:
        self.done = False
        self._first = list(module.parameters())  # not their identities: those of a copy differ
        self._late: dict[str, tuple[Tensor, int]] = {}  # parameters by name, and how often each had been changed in place
        self._others: list[tuple[Tensor, int]] = []

    def look(self, module: nn.Module, loss: Tensor) -> None:
        """Compare the parameters that a loss depends on with those at the first call."""
        if not self._late:
            self._find(module, loss)
            self.done = not self._late
        elif any(param._version != version for param, version in self._others):
            self.done = True
            still = [name for name, (param, version) in self._late.items() if param._version == version]
            if still:
                warn(still)

    def _find(self, module: nn.Module, loss: Tensor) -> None:
        names = {id(param): name for name, param in pyro.get_param_store()._params.items()}
        first = {id(param) for param in self._first}
        own = {id(param): name for name, param in module.named_parameters()}
        for param in leaves_behind([loss]):
            name = own.get(id(param), names.get(id(param)))
            if id(param) in first:
                self._others.append((param, param._version))
            elif name is not None:  # otherwise a tensor of the user, such as an argument
                self._late[name] = param, param._version


def warn(names: list[str]) -> None:
    warnings.warn(
        f"the loss depends on {quoted(names)}, which the optimiser does not change: they were created in the first "
        "call, after loss.parameters() was read. Call the loss once under torch.no_grad() before you create the "
        "optimiser, and before DistributedDataParallel. Parameters of pyro.param are in loss.parameters() where the "
        "program is a PyroModule; pass others to the optimiser yourself, or train with SVI",
        UntrainedParameterWarning,
        stacklevel=5,
    )
