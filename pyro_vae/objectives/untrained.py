"""Parameters that a loss depends on and that an optimiser was not given, since they did not exist when it was made."""

from __future__ import annotations

import warnings

import pyro
from torch import Tensor, nn

from ..errors import UntrainedParameterWarning, quoted
from .gradients import leaves_behind


class UntrainedWatch:
    """Look for them until an optimiser has moved the other parameters.

    They are made in the first call: the parameters of autoguides and lazy layers, which join the module, and those of
    `pyro.param` in programs that are no `PyroModule`, which lie in Pyro's store alone.
    """

    def __init__(self, module: nn.Module) -> None:
        self.done = False
        self._first = list(module.parameters())  # not their identities: a copy has others
        self._late: dict[str, tuple[Tensor, int]] = {}  # parameters by name, and how often each had been changed in place
        self._others: list[tuple[Tensor, int]] = []

    def look(self, module: nn.Module, loss: Tensor) -> None:
        """Compare what a loss depends on with what it was at the first call."""
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
            elif name is not None:  # else a tensor of the user's, such as an argument
                self._late[name] = param, param._version


def warn(names: list[str]) -> None:
    warnings.warn(
        f"the loss depends on {quoted(names)}, which the optimiser leaves as they are: they were made in the first call, "
        "after loss.parameters() was read. Call the loss once under torch.no_grad() before you make the optimiser, and "
        "before DistributedDataParallel. Parameters of pyro.param join loss.parameters() where the program is a "
        "PyroModule; give others to the optimiser yourself, or train with SVI",
        UntrainedParameterWarning,
        stacklevel=5,
    )
