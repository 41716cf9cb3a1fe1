"""JAX's part of evidence_speed.py: log p(x) of the same VAE for each line on standard input, prints its seconds.

    python tests/benchmarks/jax_evidence.py 1000

The number of particles. One thread. A scan over 20 pieces of the particles bounds the memory, as in the other programs.
"""

import os
import sys
import time

K = int(sys.argv[1])
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"  # read when jax is imported
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # newer versions of XLA take two cores all the same

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

N, D, H, X, PIECES = 100, 50, 400, 784, 20


def parameters(key):
    def linear(key, num_in, num_out):
        return jax.random.normal(key, (num_in, num_out)) / num_in**0.5, jnp.zeros(num_out)

    keys = jax.random.split(key, 4)
    sizes = ((X, H), (H, 2 * D), (D, H), (H, X))
    return [linear(k, *s) for k, s in zip(keys, sizes, strict=True)]


def two_layers(layers, x):
    (w, b), (v, c) = layers
    return jax.nn.softplus(x @ w + b) @ v + c


@jax.jit
def log_evidence(layers, x, key):
    loc, raw = jnp.split(two_layers(layers[:2], x), 2, -1)

    def piece(_, key):
        eps = jax.random.normal(key, (K // PIECES, N, D))
        z = loc + jnp.exp(raw) * eps
        logits = two_layers(layers[2:], z)
        log_likelihood = (x * logits - jax.nn.softplus(logits)).sum(-1)
        return None, log_likelihood + (-0.5 * z**2 + 0.5 * eps**2 + raw).sum(-1)

    log_weights = jax.lax.scan(piece, None, jax.random.split(key, PIECES))[1].reshape(K, N)
    return jax.nn.logsumexp(log_weights, 0) - jnp.log(K)


def main():
    x = (jax.random.uniform(jax.random.PRNGKey(1), (N, X)) < 0.5).astype(jnp.float32)
    layers = parameters(jax.random.PRNGKey(0))
    log_evidence(layers, x, jax.random.PRNGKey(2)).block_until_ready()
    print(f"jax {jax.__version__}", flush=True)
    for i, _ in enumerate(sys.stdin):
        start = time.perf_counter()
        log_evidence(layers, x, jax.random.PRNGKey(i)).block_until_ready()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
