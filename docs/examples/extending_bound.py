"""The Rényi bound (Li and Turner, 2016, https://arxiv.org/abs/1602.02311)."""

from pyro_vae.objectives.datum_elbo import DatumELBO
from pyro_vae.ops import log_mean_exp


class RenyiBound(DatumELBO):
    """loss = -sum over data of 1 / (1 - alpha) log 1/K sum_k w_k^(1 - alpha), in nats.

    With many particles it is log p(x) - D_alpha(q || p). It is the ELBO as alpha goes
    to 1, below log p(x) for alpha > 0, log p(x) at 0, and above it for alpha < 0.
    At -1 it is CUBO (Dieng et al., 2017, https://arxiv.org/abs/1611.00328).
    """

    def __init__(self, alpha, *, num_particles=10):
        super().__init__(num_particles=num_particles)
        self.power = 1 - alpha

    def bound(self, log_weight):  # (K, B) to (B,)
        return log_mean_exp(self.power * log_weight, 0) / self.power
