"""A bound of one's own: the Rényi bound of Li and Turner (2016, https://arxiv.org/abs/1602.02311), one per datum."""

from pyro_vae.errors import StructureError
from pyro_vae.objectives.datum import DatumELBO
from pyro_vae.objectives.importance_weighted import scored_sites
from pyro_vae.objectives.weighing import check_enumeration
from pyro_vae.ops import log_mean_exp


class RenyiBound(DatumELBO):
    """loss = -sum over data of 1 / (1 - alpha) log 1/K sum_k w_k^(1 - alpha), in nats.

    Of many particles it is log p(x) - D_alpha(q || p): the ELBO as alpha goes to 1, below log p(x) for alpha > 0, log p(x)
    at 0, above it for alpha < 0 (at -1 it is CUBO; Dieng et al., 2017, https://arxiv.org/abs/1611.00328).
    """

    def __init__(self, alpha, *, num_particles=10):
        super().__init__(num_particles=num_particles)
        self.power = 1 - alpha

    def _loss_and_surrogate(self, model, guide, args, kwargs):
        call = self._call(model, guide, args, kwargs)
        drawn = call.draw(self.num_particles)
        if scored_sites(drawn, call.structure.layout.enumerated):
            raise StructureError("the gradient runs through the draws: use a guide whose draws are reparameterised")
        weights, scale = self._weigh(call, drawn)
        check_enumeration(weights)
        bound = log_mean_exp(self.power * weights.log_weight, 0) / self.power  # (B,)
        loss = -(bound * scale).sum()  # a scale of the plate stays outside of the logarithm
        return loss.detach(), loss  # what is returned, and what it is the gradient of
