"""Sites that the guide enumerates: their values, and the probabilities of these given the drawn latents."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from torch import Tensor

from ..kernel import Call
from ..noise import Noise

MASKS = 1  # noise block


class Labels:
    """All values e of the enumerated sites with p(e given z, x), (K, B), at draws of the latents."""

    def __init__(self, call: Call) -> None:
        self._call = call
        call.set_noise(Noise.POSTERIOR, MASKS)
        self._guide = call.draw(1)  # used for its masks
        self._supports = supports(call)

    def __call__(self, values: Mapping[str, Tensor], num_particles: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """`values` by site are canonical, (K, *plates, *event)."""
        call, names = self._call, self._call.structure.guide_enumerated
        model = call.score(values, num_particles)
        log_joint = call.weigh(self._guide, model, num_particles).log_joint_of_values.double()
        axes = [-(3 + call.layout.axes[name]) for name in names]
        shares = log_joint.flatten(0, -3).softmax(0).nan_to_num(nan=0.0).reshape(log_joint.shape)
        for chosen in itertools.product(*(range(len(self._supports[name])) for name in names)):
            share = shares
            # from the left, so that removing an axis does not change the positions of the others
            for axis, index in sorted(zip(axes, chosen, strict=True)):
                share = share.select(axis, index)
            labels = {name: self._supports[name][i] for name, i in zip(names, chosen, strict=True)}
            yield share, {name: self._expanded(name, label, num_particles) for name, label in labels.items()}

    def _expanded(self, name: str, label: Tensor, num_particles: int) -> Tensor:
        """A label, (*event), for all particles and data, canonical."""
        layout = self._call.layout
        shape = layout.plain_shapes[name]
        padding = [1] * (layout.num_plates - len(shape))
        return label.expand(num_particles, *padding, *shape, *label.shape)


def supports(call: Call) -> dict[str, Tensor]:
    """The values of each site that the guide enumerates, (E, *event), from a plain run, where their layout is known."""
    found = {}
    sites = call.guide.run()
    for name in call.structure.guide_enumerated:
        value, event_dim = sites[name].value, call.layout.event_dims[name]
        value = value.movedim(value.ndim - event_dim + call.layout.enum_dim(name, leading=False), 0)
        found[name] = value.reshape(len(value), -1, *value.shape[value.ndim - event_dim :])[:, 0]
    return found
