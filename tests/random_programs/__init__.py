"""Random small programs, whose log p(x) and ELBO are known by sums and grids that know nothing of the kernel.

`description` says what a program is, `generator` draws one, `oracle` has the right values, `pyro_pair` writes it in Pyro,
`judge` compares. `python -m tests.random_programs --number 10000` runs many of them.
"""
