"""A `Pair` for training: it runs without isolation, so that gradients, buffers and random state change as usual."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .. import isolation
from ..arguments import check_signature, devices_of, signature_of
from ..errors import BatchCouplingError
from .calls import Call
from .checks.autoguides import refuse_guide
from .checks.plates import INFER
from .pairs import Pair


class LivePair(Pair):
    """A model and guide in training.

    At the first call with arguments of new shapes, runs in eval mode find the structure. The structure is kept while
    parameters change.
    """

    # Dropout is intended. NaN gives a warning about the loss, as in Pyro. Densities of givens and of observations in the
    # guide would be missing in the gradient, so they raise.
    in_training = True

    def __init__(
        self, model: Callable, guide: Callable, *, datum_plate: str | None = INFER, prior_sites: Collection[str] = ()
    ) -> None:
        super().__init__(model, guide, datum_plate=datum_plate, prior_sites=prior_sites, check_support=False)
        self._norms: dict[Any, list[nn.Module]] = {}  # those that run inside

    def call(self, args: tuple, kwargs: Mapping[str, Any], indices: dict[str, Tensor] | None = None) -> Call:
        """:param indices: indices by plate, from another call for the same data."""
        devices = devices_of((args, kwargs), isolation.modules_of(self.model, self.guide))
        key = self._key(args, kwargs)
        if key not in self._known:
            for name, program in (("model", self.model), ("guide", self.guide)):
                check_signature(name, program, args, kwargs)
            with kept_store_on_error():
                found, norms = self._rehearse(args, kwargs, devices)
            key = self._key(args, kwargs)  # lazy modules have been created by now
            self._known[key], self._norms[key] = found, norms
        guide, model = self._programs(args, kwargs, {} if indices is None else indices, lambda name, fn: fn())
        structure, guide.names, model.names, guide.execution, model.execution = self._known[key]
        if model.execution == "vmap" and any(norm.training for norm in self._norms[key]):
            model.execution = "loop"  # torch.vmap does not update their statistics
        guide.layout = model.layout = structure.layout
        call = Call(guide, model, structure, 0, devices[0], check_support=False, pair=self)
        call.data_checked = call.masks_checked = True
        return call

    def _key(self, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        modes = tuple(m.training for top in isolation.modules_of(self.model, self.guide) for m in top.modules())
        # A float may be a weight that a loop anneals: the structure does not depend on its value.
        return signature_of((args, kwargs), floats=False), modes

    def _rehearse(self, args: tuple, kwargs: Mapping[str, Any], devices: list[torch.device]) -> tuple[Any, list[nn.Module]]:
        guide, model = self._programs(args, kwargs, {}, lambda name, fn: fn())
        with torch.no_grad(), rehearsal(self.model, self.guide, devices=devices) as in_train_mode:
            with NewParameters() as new:  # and lazy parts, from the user's random state
                drawn = {n: s.value for n, s in guide.run().items() if not s.is_observed}
                model.run(values=drawn)
            state = pyro.util.get_rng_state() if new.drawn else None
            refuse_coupling(in_train_mode)
            refuse_guide(self.guide, self.datum_plate)
            with moved_parameters() as norms:
                found = self.find_out(guide, model, seed=0)
            structure, guide.names, model.names, guide.execution, model.execution = found
            call = Call(guide, model, structure, 0, devices[0], check_support=False, pair=self)
            call.data_checked = True
            once = call.draw(1)
            call.weigh(once, call.score(call.latent_values(once), 1), 1)  # looks at the masks
        if state is not None:
            pyro.util.set_rng_state(state)  # later draws must not repeat the noise of new parameters
        return found, norms


class NewParameters(Messenger):
    """Records whether a parameter was created by a function, which may have drawn it."""

    drawn = False

    def _pyro_param(self, msg: Any) -> None:
        name, init = (*msg["args"], None)[:2]
        self.drawn |= callable(init) and name not in pyro.get_param_store()


@contextmanager
def rehearsal(*programs: Callable, devices: list[torch.device]) -> Iterator[list[nn.Module]]:
    """Runs in eval mode without side effects. Yields the modules that were in train mode."""
    with isolation.unseen(*programs, devices=devices), isolation.eval_mode(*programs) as switched:
        yield switched


@contextmanager
def kept_store_on_error() -> Iterator[None]:
    """Remove new parameters from the store if an error is raised."""
    store = pyro.get_param_store()
    saved = {name: dict(getattr(store, name)) for name in isolation.STORE}
    try:
        yield
    except BaseException:
        for name, content in saved.items():
            setattr(store, name, content)
        raise


@contextmanager
def moved_parameters() -> Iterator[list[nn.Module]]:
    """Temporarily perturb parameters and statistics of norms: initial zeros and ones can hide a dependence.

    Changes numbers by 1% and zeros by 0.1, in the store and in all modules that run inside. Yields the norms that ran.
    """
    norms: list[nn.Module] = []
    moved: dict[int, tuple[Tensor, Tensor]] = {}

    def move(tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor.is_floating_point() and id(tensor) not in moved:
                moved[id(tensor)] = tensor, tensor.detach().clone()
                noise = torch.randn_like(tensor)
                tensor.data.copy_(torch.where(tensor == 0, 0.1 * noise, tensor * (1 + 0.01 * noise)))

    def move_module(module: nn.Module, inputs: Any = ()) -> None:
        move(module.parameters(recurse=False))
        if isinstance(module, nn.modules.batchnorm._NormBase) and module not in norms:
            norms.append(module)
            move(module.buffers(recurse=False))

    move(pyro.get_param_store()._params.values())
    hook = register_module_forward_pre_hook(move_module)
    try:
        yield norms
    finally:
        hook.remove()
        for tensor, old in reversed(moved.values()):  # a later one may share its memory with an earlier one
            tensor.data.copy_(old)


@contextmanager
def rehearsed(guide: Callable, model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """A rehearsal with perturbed parameters, for runs that test dependences."""
    devices = devices_of((args, kwargs), isolation.modules_of(guide, model))
    with rehearsal(guide, model, devices=devices), moved_parameters():
        yield


def refuse_coupling(modules: list[nn.Module]) -> None:
    for module in modules:
        if getattr(module, "couples_batch", False):
            raise BatchCouplingError(
                f"{module} in train mode uses statistics of the batch, so the weight of a datum would depend on its "
                "neighbours: give it a parameter instead, or train with a Beta*_ELBO"
            )
