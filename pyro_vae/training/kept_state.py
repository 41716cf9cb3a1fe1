"""A copy of everything that training changes in a pair, which can be written back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pyro
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from ..errors import OptionError, quoted
from ..isolation import modules_of

STORE, MODULE = "param", "module"  # prefixes of the names of the two kinds of tensors


class KeptState:
    """Parameters and buffers of a pair: those in Pyro's store, and those of its modules.

    Modules in closures are found when they run inside `finding()`. Values are copied, and written back in place, so that an
    optimiser keeps the same tensors.
    """

    def __init__(self, *programs: Callable) -> None:
        self._modules = list(dict.fromkeys(part for top in modules_of(*programs) for part in top.modules()))
        self.values: dict[str, Tensor] = {}  # what is kept, by name

    @contextmanager
    def finding(self) -> Iterator[None]:
        """Register every module that runs inside."""
        known = set(self._modules)

        def meet(module: torch.nn.Module, args: object) -> None:
            if module not in known:
                known.add(module)
                self._modules.append(module)

        hook = register_module_forward_pre_hook(meet)
        try:
            yield
        finally:
            hook.remove()

    def keep(self) -> None:
        """Copy the current values; each tensor once, also if it has several names."""
        seen: set[int] = set()
        self.values = {}
        for name, tensor in self._tensors().items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                self.values[name] = tensor.detach().clone()

    @torch.no_grad()
    def put_back(self) -> None:
        """Write the kept values into the tensors of the same names.

        :raises OptionError: if there is no such tensor, or its shape differs; then nothing is written.
        """
        tensors = self._tensors()
        wrong = [n for n, value in self.values.items() if n not in tensors or tensors[n].shape != value.shape]
        if wrong:
            raise OptionError(
                f"the kept values of {quoted(wrong[:5])} have no tensor of their shape in this pair and Pyro's parameter "
                "store: build the same model and guide, run both once, and restore then"
            )
        for name, value in self.values.items():
            tensors[name].copy_(value)

    def _tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {f"{STORE} {name}": param for name, param in pyro.get_param_store()._params.items()}
        for number, module in enumerate(self._modules):
            named: Mapping[str, Tensor | None] = {**module._parameters, **module._buffers}
            found |= {f"{MODULE} {number} {name}": tensor for name, tensor in named.items() if tensor is not None}
        return found
