"""Groups of parameters with the same options in one torch optimiser, and their state by parameter in Pyro's format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import OptionError, quoted
from .optimiser_options import HOW, Options


class ParamGroup:
    """The options of some parameters, in a dict that is one of the `param_groups` of the optimiser over all parameters.

    :ivar host: the torch optimiser that Pyro would create for the first of them. It fills in the defaults and has the
        options for a scheduler. It never steps.
    :ivar scheduler: the learning-rate scheduler on the host, or None.
    :ivar members: the parameters.
    """

    def __init__(self, host: Optimizer, scheduler: LRScheduler | None = None) -> None:
        self.host, self.scheduler = host, scheduler
        host._opt_called = True  # type: ignore[attr-defined]  # else the scheduler warns that its host has not stepped
        self.members: list[Tensor] = []

    @property
    def options(self) -> Options:
        options: Options = self.host.param_groups[0]
        return options

    def is_like(self, other: ParamGroup) -> bool:
        """Whether both groups will update parameters in the same way; different current learning rates differ."""
        sides = [{k: v for k, v in group.options.items() if k != "params"} for group in (self, other)]
        schedulers = [group.scheduler and group.scheduler.state_dict() for group in (self, other)]
        return same(*sides) and same(*schedulers)

    def state_of(self, state: Options | None) -> Options:
        """The state of one parameter as Pyro saves it, from the state of the torch optimiser."""
        options = {**self.options, "params": [0]}
        saved: Options = {"state": {0: state} if state else {}, "param_groups": [options]}
        return {"scheduler": self.scheduler.state_dict(), "optimizer": saved} if self.scheduler else saved

    def load(self, saved: Any, param: Tensor, label: str) -> None:
        """Load the options from the state of one parameter as saved by Pyro; its tensors are then in `host.state`."""
        outer = {"scheduler", "optimizer"} if self.scheduler else {"state", "param_groups"}
        if not isinstance(saved, dict) or saved.keys() != outer:
            got = sorted(saved) if isinstance(saved, dict) else saved
            raise OptionError(
                f"the state of {label} must have {sorted(outer)}, got {got!r}: load it into an optimiser of the same "
                "kind as saved it, with or without a scheduler"
            )
        inner = saved["optimizer"] if self.scheduler else saved
        (group,) = inner["param_groups"]
        unknown = group.keys() - self.options.keys() - {"initial_lr"}
        if unknown:
            raise OptionError(
                f"the state of {label} has the options {sorted(unknown)}, so another class of optimiser saved it: use "
                "that class"
            )
        for state in inner["state"].values():
            for key, value in state.items():
                if isinstance(value, Tensor) and not fits(value, param):
                    raise OptionError(
                        f"the state of {label} has '{key}' of shape {tuple(value.shape)}, but the parameter is of shape "
                        f"{tuple(param.shape)}: load the state of the same program"
                    )
                if isinstance(value, Tensor):  # with the memory layout of the parameter: see `with_fused`
                    state[key] = value.contiguous()
        group |= {key: self.options[key] for key in HOW if key in self.options}
        self.host.load_state_dict(inner)
        if self.scheduler:
            self.scheduler.load_state_dict(saved["scheduler"])


def check_names(names: Iterable[str | None], saved: Mapping[str, Any]) -> None:
    """Raise for a state of other parameters, which would never be used, so that training would start anew."""
    known = [str(name) for name in names]
    if saved and saved.keys().isdisjoint(known):
        raise OptionError(
            f"no parameter of this step is in the loaded state: it has {quoted(list(saved)[:3])}, the step has "
            f"{quoted(known[:3])}. Give the parameters the names that they had when it was saved (VAEs of pyro_vae "
            "number theirs: build them in the same order), or start with a new optimiser"
        )


def checked_name(name: str | None, param: Tensor) -> str:
    if name is None:
        raise OptionError(
            f"a parameter of shape {tuple(param.shape)} has no name in Pyro's store, so its state cannot be saved by "
            "name: train with pyro.settings.set(module_local_params=False), or train with a torch optimiser"
        )
    return name


def fits(value: Tensor, param: Tensor) -> bool:
    """Whether a tensor of the state fits this parameter; some are counts, some have axes of size one."""
    return value.dim() != param.dim() or all(a in (1, b) for a, b in zip(value.shape, param.shape, strict=True))


def same(one: Any, other: Any) -> bool:
    """Equality of options; a tensor, such as a learning rate, is equal only to the same tensor object."""
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor) or type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
