"""NumPyro's part of training_speed.py: takes a step of the same VAE for each line on standard input, prints its seconds.

    python tests/benchmarks/numpyro_step.py 32 1 perf_counter

The batch size, the number of threads, and a clock of Python's module time.
"""

import os
import sys
import time

BATCH, THREADS = map(int, sys.argv[1:3])
CLOCK = getattr(time, sys.argv[3])
if THREADS == 1:  # read when jax is imported
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # newer versions of XLA take two cores all the same

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpyro  # noqa: E402
import numpyro.distributions as dist  # noqa: E402
from jax.example_libraries import stax  # noqa: E402
from numpyro.infer import SVI, TraceMeanField_ELBO  # noqa: E402

X, H, D = 784, 400, 50
ENCODER = stax.serial(stax.Dense(H), stax.Relu, stax.Dense(2 * D))
DECODER = stax.serial(stax.Dense(H), stax.Relu, stax.Dense(X))


def model(x):
    decoder = numpyro.module("decoder", DECODER, (BATCH, D))
    with numpyro.plate("data", BATCH):
        z = numpyro.sample("latent", dist.Normal(jnp.zeros((BATCH, D)), 1.0).to_event(1))
        numpyro.sample("obs", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)


def guide(x):
    encoder = numpyro.module("encoder", ENCODER, (BATCH, X))
    loc, log_scale = jnp.split(encoder(x), 2, -1)
    with numpyro.plate("data", BATCH):
        numpyro.sample("latent", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))


def main():
    x = (jax.random.uniform(jax.random.PRNGKey(1), (BATCH, X)) < 0.3).astype(jnp.float32)
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), TraceMeanField_ELBO())
    state = svi.init(jax.random.PRNGKey(0), x)
    update = jax.jit(svi.update)
    state, loss = update(state, x)
    jax.block_until_ready(loss)
    print(f"NumPyro {numpyro.__version__}, jax {jax.__version__}", flush=True)
    for _ in sys.stdin:
        start = CLOCK()
        state, loss = update(state, x)
        jax.block_until_ready((state, loss))
        print(CLOCK() - start, flush=True)


if __name__ == "__main__":
    main()
