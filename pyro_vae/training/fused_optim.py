"""One torch optimiser over all parameters for Pyro's SVI, in place of one for each parameter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer

from ..errors import OptionError
from .optimiser_options import Options, check_kinds, checked_clips, clip_gradients, refused, split_scheduler, with_fused
from .param_groups import ParamGroup, check_names, checked_name


class FusedOptim(PyroOptim):
    """An optimiser for `SVI` with one torch optimiser over all parameters, which is faster than one for each.

    Updates are the same as with `pyro.optim`, but the overhead of an optimiser step is paid once, not once for each
    parameter. Parameters with the same options form one param group. ``fused=True`` is added to the options if the torch
    optimiser supports it for tensors of this device, dtype and memory layout; this is tested on two numbers. Options that
    contain ``fused`` or ``foreach`` are not changed. Sparse gradients need ``fused=False``.

    :param optim_constructor: a class of `torch.optim`, or `pyro.optim.clipped_adam.ClippedAdam`; or a learning-rate
        scheduler of `torch.optim.lr_scheduler`, see below. LBFGS raises: it needs a closure, which SVI does not have.
    :param optim_args: the options of the torch optimiser as a dict, or a function from the name of a parameter to such a
        dict, for learning rates by parameter.
    :param clip_args: a dict with `clip_norm`, `clip_value` or both, or a function (module name, parameter name) to such a
        dict. As in Pyro, each parameter is clipped separately.
    :ivar optimizer: the torch optimiser, with the param groups of the last step; None before the first step.
    :ivar optim_objs: by the first parameter of each group, an object whose `param_groups[0]` are the options of the whole
        group. They can be changed, as in ``for one in optim.optim_objs.values(): one.param_groups[0]["lr"] *= 0.5``.
    :raises OptionError: for a class, options or a state that do not fit together; for a closure.

    **Schedulers** as in Pyro: `optim_args` has "optimizer", "optim_args", and the scheduler's own options. Call `step()`
    after each epoch. The schedule of a parameter that is added later starts then.

    **State** is by name of the parameter and in Pyro's format: `get_state`, `set_state`, `save` and `load` read and write
    the same as those of `pyro.optim`. Unlike there, the state is a copy, and it is applied also to parameters that have
    already been updated. Copies and pickles contain it. Parameters outside Pyro's store (`module_local_params`) have no
    name, so their state cannot be saved.

    **Unlike pyro.optim**, gradients are None after a step, not zero. A parameter without a gradient in the next step is then
    skipped, as in torch; with Pyro's zeros, Adam's momentum would still change it. And `lrd` of `ClippedAdam` counts the
    steps of a param group, not those of each parameter.

    Example::

        optim = pv.FusedOptim(torch.optim.Adam, {"lr": 1e-3}, {"clip_norm": 10.0})
        svi = SVI(vae.model, vae.guide, optim, pv.BetaTraceMeanField_ELBO())
        svi.step(x)

        by_name = lambda name: {"lr": 1e-2 if name.endswith("bias") else 1e-3}
        optim = pv.FusedOptim(torch.optim.AdamW, by_name)

        options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-3}, "gamma": 0.99}
        optim = pv.FusedOptim(torch.optim.lr_scheduler.ExponentialLR, options)
        svi = SVI(vae.model, vae.guide, optim, pv.BetaTraceMeanField_ELBO())
        for epoch in range(100):
            for (x,) in loader:
                svi.step(x)
            optim.step()
    """

    optimizer: Optimizer | None
    _groups: list[ParamGroup]
    _group_of: dict[Tensor, ParamGroup]
    _names: dict[Tensor, str | None]
    _clips: list[tuple[Options, list[Tensor]]]  # of the parameters of the last step
    _chosen: set[Tensor]  # the parameters of the last step

    def __init__(
        self,
        optim_constructor: Callable[..., Any],
        optim_args: Options | Callable[..., Options],
        clip_args: Options | Callable[..., Options] | None = None,
    ) -> None:
        optim_constructor, optim_args, self._make_scheduler = split_scheduler(optim_constructor, optim_args)
        clip_args = {} if clip_args is None else clip_args
        check_kinds(optim_constructor, optim_args, clip_args)
        super().__init__(optim_constructor, optim_args, clip_args)
        self._forget()
        if isinstance(optim_args, dict):
            self._make_group(torch.zeros(1, 1, requires_grad=True), "the parameters")
        if isinstance(clip_args, dict):
            checked_clips(clip_args)

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Update each parameter by its gradient; the gradients are None afterwards."""
        if args or kwargs:
            raise OptionError("FusedOptim takes parameters only, because SVI has no closure: call it without one")
        params = params if isinstance(params, set) else set(params)
        if not params:
            return
        if params != self._chosen:  # compared by identity, without a call per parameter
            self._choose(set(params))
        for clips, clipped in self._clips:
            clip_gradients(clipped, **clips)
        assert self.optimizer is not None
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def scheduler(self) -> Any:
        """The class of the learning-rate schedulers, or None."""
        return None if self._make_scheduler is None else self._make_scheduler.func

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the schedulers after an epoch; arguments, such as the loss for `ReduceLROnPlateau`, are passed on to them."""
        if self._make_scheduler is None:
            raise OptionError(
                "step() advances learning-rate schedulers, and there is none: SVI.step updates the parameters. For a "
                "scheduler write FusedOptim(torch.optim.lr_scheduler.StepLR, "
                "{'optimizer': ..., 'optim_args': ..., 'step_size': 10})"
            )
        for group in self._groups:
            group.scheduler.step(*args, **kwargs)  # type: ignore[union-attr]

    def get_state(self) -> dict[str, Any]:
        """A copy of the state by name of the parameter, in Pyro's format, with loaded states that are not yet in use."""
        states = dict(self._state_waiting_to_be_consumed)
        for param, group in self._group_of.items():
            name = checked_name(self._names[param], param)
            states[name] = group.state_of(self.optimizer.state.get(param) if self.optimizer else None)
        return copy.deepcopy(states)

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Load a state of `get_state()` or of `pyro.optim`; it is applied at the next step that updates a parameter."""
        if not isinstance(state_dict, dict):
            raise OptionError(f"the state of an optimiser must be a dict by name of the parameter, got {state_dict!r}")
        self._state_waiting_to_be_consumed = {**self.get_state(), **copy.deepcopy(state_dict)}
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), **nothing_met(), "_state_waiting_to_be_consumed": self.get_state()}

    def _forget(self) -> None:
        """Add all parameters again at the next step."""
        vars(self).update(nothing_met())

    def _choose(self, params: set[Tensor]) -> None:
        """Select the parameters that the next steps update: a program may use only some, and Pyro updates only these."""
        new = [param for param in params if param not in self._group_of]
        if not self._group_of:
            check_names(map(pyro.get_param_store().param_name, new), self._state_waiting_to_be_consumed)
        for param in new:
            self._meet(param)
        for group in self._groups:
            group.options["params"] = [param for param in group.members if param in params]
        assert self.optimizer is not None
        self.optimizer.param_groups = [group.options for group in self._groups if group.options["params"]]
        self._clips = []
        for param in params:
            with refused("bounds of the gradient", f"a parameter of shape {tuple(param.shape)}"):
                clips = checked_clips(self._get_grad_clip_args(param))  # type: ignore[arg-type]
            alike = [clipped for known, clipped in self._clips if known == clips]
            if alike:
                alike[0].append(param)
            elif clips:
                self._clips.append((clips, [param]))
        self._chosen = params

    def _meet(self, param: Tensor) -> None:
        """Add a new parameter to a group, with its loaded state."""
        name = pyro.get_param_store().param_name(param)
        label = f"a parameter of shape {tuple(param.shape)}" if name is None else f"the parameter '{name}'"
        if name is None and (callable(self.pt_optim_args) or callable(self.pt_clip_args)):
            raise OptionError(f"{label} has no name in Pyro's store, so options by name are not possible: pass a dict")
        group = self._make_group(param, label)
        if name in self._state_waiting_to_be_consumed:
            group.load(self._state_waiting_to_be_consumed[name], param, label)
            del self._state_waiting_to_be_consumed[name]
        if self.optimizer is None:
            self.optimizer = self._make_host(param, label)
            self.optimizer.state.clear()
        if param in group.host.state:  # loaded, or created by the constructor, as in Adagrad
            self.optimizer.state[param] = group.host.state.pop(param)
        alike = next((known for known in self._groups if known.is_like(group)), None)
        if alike is None:
            self._groups.append(group)
        group = alike or group
        group.members.append(param)
        self._group_of[param], self._names[param] = group, name
        if alike is None:  # once for a group: code that writes to all of them would otherwise write several times
            self.optim_objs[param] = group.scheduler or group.host

    def _make_group(self, param: Tensor, label: str) -> ParamGroup:
        host = self._make_host(param, label)
        if self._make_scheduler is None:
            return ParamGroup(host)
        with refused(self._make_scheduler, label):
            return ParamGroup(host, self._make_scheduler(host))

    def _make_host(self, param: Tensor, label: str) -> Optimizer:
        """The torch optimiser that Pyro would create for this parameter."""
        with refused(self.pt_optim_constructor, label):
            options = with_fused(self.pt_optim_constructor, self._get_optim_args(param), param)  # type: ignore[arg-type]
            host = self.pt_optim_constructor([param], **options)  # type: ignore[operator]
            if not isinstance(host, Optimizer):
                raise TypeError(f"{host!r} is not a torch optimiser")
            return host


def nothing_met() -> dict[str, Any]:
    """The attributes of a `FusedOptim` that has not updated any parameter."""
    empty: dict[str, Any] = {name: {} for name in ("optim_objs", "_group_of", "_names")}
    return {**empty, "optimizer": None, "_groups": [], "_clips": [], "_chosen": set()}
