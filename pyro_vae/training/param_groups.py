"""Parameters that one torch optimiser moves with the same options, and their state by parameter as Pyro writes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import OptionError, quoted
from .optimiser_options import HOW, Options


class ParamGroup:
    """The options of some parameters, in a dict that the optimiser over all parameters has among its `param_groups`.

    :ivar host: the torch optimiser that Pyro would keep for the first of them. It fills in the defaults and holds the
        options for a scheduler, and never steps.
    :ivar scheduler: on the host, or None.
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
        """Whether both move parameters in the same way from now on; a group whose learning rate has changed is another."""
        sides = [{k: v for k, v in group.options.items() if k != "params"} for group in (self, other)]
        schedulers = [group.scheduler and group.scheduler.state_dict() for group in (self, other)]
        return same(*sides) and same(*schedulers)

    def state_of(self, state: Options | None) -> Options:
        """What Pyro saves of one parameter, given the torch optimiser's state of it."""
        options = {**self.options, "params": [0]}
        saved: Options = {"state": {0: state} if state else {}, "param_groups": [options]}
        return {"scheduler": self.scheduler.state_dict(), "optimizer": saved} if self.scheduler else saved

    def load(self, saved: Any, param: Tensor, label: str) -> None:
        """Take the options from what Pyro saved of one parameter; its state is in `host.state` then."""
        outer = {"scheduler", "optimizer"} if self.scheduler else {"state", "param_groups"}
        if not isinstance(saved, dict) or saved.keys() != outer:
            got = sorted(saved) if isinstance(saved, dict) else saved
            raise OptionError(
                f"the state of {label} must have {sorted(outer)}, got {got!r}: load it into an optimiser of the kind that "
                "saved it, with a scheduler or without"
            )
        inner = saved["optimizer"] if self.scheduler else saved
        (group,) = inner["param_groups"]
        unknown = group.keys() - self.options.keys() - {"initial_lr"}
        if unknown:
            raise OptionError(
                f"the state of {label} has the options {sorted(unknown)}, so another class of optimiser saved it: use that"
            )
        for state in inner["state"].values():
            for key, value in state.items():
                if isinstance(value, Tensor) and not fits(value, param):
                    raise OptionError(
                        f"the state of {label} has '{key}' of shape {tuple(value.shape)}, but the parameter is of shape "
                        f"{tuple(param.shape)}: load the state of the same program"
                    )
                if isinstance(value, Tensor):  # in memory as the parameter: see `with_fused`
                    state[key] = value.contiguous()
        group |= {key: self.options[key] for key in HOW if key in self.options}
        self.host.load_state_dict(inner)
        if self.scheduler:
            self.scheduler.load_state_dict(saved["scheduler"])


def check_names(names: Iterable[str | None], saved: Mapping[str, Any]) -> None:
    """Refuse a state of other parameters, which would wait for ever while training starts afresh."""
    known = [str(name) for name in names]
    if saved and saved.keys().isdisjoint(known):
        raise OptionError(
            f"no parameter of this step is in the loaded state: it has {quoted(list(saved)[:3])}, the step has "
            f"{quoted(known[:3])}. Give the parameters the names that they had when it was saved (VAEs of pyro_vae count "
            "theirs up: build them in the same order), or start with a new optimiser"
        )


def checked_name(name: str | None, param: Tensor) -> str:
    if name is None:
        raise OptionError(
            f"a parameter of shape {tuple(param.shape)} has no name in Pyro's store, so its state cannot be saved by name: "
            "train with pyro.settings.set(module_local_params=False), or under a torch optimiser"
        )
    return name


def fits(value: Tensor, param: Tensor) -> bool:
    """Whether a tensor of the state can be one of this parameter; some are counts, some have axes of size one."""
    return value.dim() != param.dim() or all(a in (1, b) for a, b in zip(value.shape, param.shape, strict=True))


def same(one: Any, other: Any) -> bool:
    """Equality of options; a tensor, such as a learning rate, is the same only if it is the same tensor."""
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor) or type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
