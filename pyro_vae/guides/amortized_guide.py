"""An amortized guide that is built from the model, with a head for each latent site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import pyro
import torch
from torch import Tensor, nn

from .. import isolation
from ..arguments import devices_of
from ..errors import ArgumentError, StructureError, described
from ..kernel import INFER, Layout, latent_sites
from ..models.checks import checked_network
from ..models.parameters import Program, announce
from ..options import flag, one_of
from .rows import Rows
from .site_head import Family, SiteHead, SiteSpace, beside
from .supports import transform_of


class AmortizedGuide(Program):
    r"""An amortized guide for any Pyro model with continuous latents: a network with one head per latent site::

        q(z_1, ..., z_S given x) = prod_s q_s(z_s given network(x)),   z_s = T_s(u_s)

    u_s is unconstrained, and T_s the bijection to the support of the site in the model (`torch.distributions.biject_to`).
    Kingma and Welling, 2014, https://arxiv.org/abs/1312.6114; the bijections Kucukelbir et al., 2017,
    https://arxiv.org/abs/1603.00788.

    :param model: a Pyro model. It is run twice under its prior, to find its latents; it is not stored.
    :param network: module from the model's arguments to features, (B, H), one row for each datum.
    :param args: arguments of the model, such as a batch `(x,)`. Their shapes determine the sizes of the heads. Later calls
        may have a different number of data.
    :param kwargs: keyword arguments of the model.
    :param family: the family of each u_s given the features.

        `"diagonal"` independent normal numbers. `"full"` a normal with full covariance within each site, with a mean that is
        linear in the noise of the sites before it. Together this is one normal with full covariance for all latents of a
        datum. Elements of plates inside a datum depend on one another through earlier sites only, as in the model. `"flow"`
        a spline for each number, then autoregressive layers in both orders (`pyro_vae.nn.Flow`).
    :param conditioned: whether the values of all sites before it, in the order of the model, are inputs of the network of a
        site: q_s(z_s given network(x), z_1, ..., z_{s-1}).
    :param datum_plate: the plate of the data; by default the one common to all observed sites. `None` makes the whole call
        one datum: the network then returns (1, H).
    :raises StructureError: for a discrete latent that is not enumerated, a support without a bijection or one that depends
        on other latents or on the data, and a model without latents.
    :raises DatumPlateError: where the plate of the data is not known.
    :raises SubsamplingError: where the model gets its subsample as an argument.
    :raises ArgumentError: where the network does not return features (B, H), and for arguments that the model does not
        accept.
    :raises OptionError: for another family, or a network that is not a module.

    Latents in the plate of the data are amortized. A latent outside it, which is common to all data, has free parameters of
    the same family. Sites that the model enumerates (`pyro.infer.config_enumerate`) are not in the guide: objectives and
    estimators sum them out. They also apply a mask of a latent in the model to the guide, except for a mask inside an event.

    It is an `nn.Module` with all its parameters from the start, and trains with `SVI` and `torch.optim`.

    Example::

        def model(x):                                     # counts x (B, 64), each row with a rate
            with pyro.plate("data", len(x)):
                rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
                pyro.sample("obs", dist.Poisson(rate.unsqueeze(-1).expand(*rate.shape, 64)).to_event(1), obs=x)

        guide = pv.AmortizedGuide(model, pv.nn.MLP(64, 32), (x,))
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        svi.step(x)
        pv.InferenceGaps(model, guide, seed=0)(x)
    """

    def __init__(
        self,
        model: Callable,
        network: nn.Module,
        args: Sequence[Any],
        *,
        kwargs: Mapping[str, Any] | None = None,
        family: Family = "diagonal",
        conditioned: bool = False,
        datum_plate: str | None = INFER,
    ) -> None:
        super().__init__("guide")
        one_of("family", family, Family)
        flag("conditioned", conditioned)
        checked_network("network", network, gives="features (B, H)")
        if not isinstance(args, (tuple, list)):
            raise ArgumentError(f"args must be a tuple of the model's arguments, such as (x,), got {described(args)}")
        if not (kwargs is None or isinstance(kwargs, Mapping)):
            raise ArgumentError(f"kwargs must be a dict of the model's keyword arguments, got {described(kwargs)}")
        args, kwargs = tuple(args), dict(kwargs or {})
        sites, again, self.layout = latent_sites(model, args, kwargs, datum_plate)
        if not sites:
            raise StructureError("the model has no latent that a guide could draw: all its sites are observed or enumerated")
        self.network, self.family = network, family
        with isolation.isolated(network, devices=devices_of((args, kwargs), [network])), torch.no_grad():
            features = self._features(args, kwargs)
        self.frames = {name: [f for f in site.frames if f.vectorized] for name, site in sites.items()}
        self._check_rows(len(features))
        width = features.shape[-1]
        inside = {name: self.layout.datum_plate in (None, *(f.name for f in self.frames[name])) for name in sites}
        spaces = {name: space_of(site, again[name], self.layout, inside[name]) for name, site in sites.items()}
        self.inside, self.names, heads = inside, tuple(sites), []
        for i, name in enumerate(self.names):
            earlier = sum(spaces[n].numbers for n in self.names[:i] if self._sees(name, n))
            heads.append(SiteHead(name, spaces[name], family, width if inside[name] else 1, earlier, conditioned))
        self.heads = nn.ModuleList(heads)
        first = next(network.parameters(), None)
        if first is not None:
            self.heads.to(device=first.device, dtype=first.dtype)

    def _sees(self, name: str, other: str) -> bool:
        """Whether a site may depend on an earlier one: latents common to all data cannot depend on those of a datum."""
        return self.inside[name] or not self.inside[other]

    def _features(self, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        features = self.network(*args, **kwargs)
        if isinstance(features, Tensor) and features.ndim == 1 and self.layout.datum_plate is None:
            features = features.unsqueeze(0)
        whole = self.layout.datum_plate is None
        if not isinstance(features, Tensor) or features.ndim != 2 or whole and len(features) != 1:
            rows = "(1, H), all data together being one datum" if whole else "(B, H), one row for each datum"
            raise ArgumentError(
                f"the network of an AmortizedGuide gives features {rows}, got {described(features)}: it must take the "
                "arguments of the model and end in a layer with H outputs"
            )
        return features

    def _check_rows(self, num_rows: int) -> None:
        plate = self.layout.datum_plate
        found = [frame for frames in self.frames.values() for frame in frames if frame.name == plate]
        if found and found[0].size != -1 and num_rows not in (found[0].size, found[0].full_size):
            raise ArgumentError(
                f"the network of an AmortizedGuide gives {num_rows} rows of features for {found[0].size} data in the "
                f"plate '{plate}': it must return one row for each datum"
            )

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latents; returns them by name."""
        announce(self)
        features = self._features(args, kwargs)
        plates = self._plates(len(features))
        features = self._rows_of_plate(features, plates)
        values: dict[str, Tensor] = {}
        earlier: dict[str, Tensor] = {}
        noise: dict[str, Tensor] = {}
        for name, head in zip(self.names, cast(list[SiteHead], self.heads), strict=True):
            before = [n for n in earlier if self._sees(name, n)]
            rows = features if self.inside[name] else features.new_ones(1, 1)
            none = rows[..., :0]
            fn = head(rows, beside(none, *(earlier[n] for n in before)), beside(none, *(noise[n] for n in before if noise)))
            with ExitStack() as stack:
                for frame in self.frames[name]:
                    stack.enter_context(plates[frame.name])
                values[name] = pyro.sample(name, head.space.placed(fn))
            unconstrained = head.space.unconstrained(values[name])
            earlier[name] = head.space.rows.of(unconstrained, len(head.space.shape))
            if self.family == "full":
                noise[name] = head.noise_of(fn, unconstrained)
        return values

    def _plates(self, num_rows: int) -> dict[str, Any]:
        plates: dict[str, Any] = {}
        for frame in dict.fromkeys(frame for frames in self.frames.values() for frame in frames):
            size, subsample = frame.full_size or frame.size, frame.size
            if frame.name == self.layout.datum_plate and num_rows != size:
                size, subsample = (size, num_rows) if subsample != size else (num_rows, num_rows)
            unsized = size == -1
            plates[frame.name] = pyro.plate(
                frame.name, None if unsized else size, subsample_size=subsample if subsample != size else None, dim=frame.dim
            )
        return plates

    def _rows_of_plate(self, features: Tensor, plates: Mapping[str, Any]) -> Tensor:
        """The features of the data in a plate's subsample, where the network had all data."""
        plate = plates.get(self.layout.datum_plate or "")
        if plate is None or plate.subsample_size in (-1, len(features)):
            return features
        return features[plate.indices]


def space_of(site: Any, again: Any, layout: Layout, inside: bool) -> SiteSpace:
    """:param again: the same site in another run under the prior."""
    transform = transform_of(site, again)
    shape = torch.Size(transform.inverse_shape(site.fn.event_shape))
    return SiteSpace(Rows(site.fn.batch_shape, layout.num_plates, layout.datum_dim if inside else None), shape, transform)
