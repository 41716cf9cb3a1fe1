"""Which names in the text are links, and to where. Needs no Sphinx.

The addresses outside are a table and no intersphinx inventories, which a build without a network could not fetch.
"""

import re

import pyro_vae

TORCH, PYRO, PYTHON = (
    "https://docs.pytorch.org/docs/stable/",
    "https://docs.pyro.ai/en/stable/",
    "https://docs.python.org/3/",
)
PAGES = {
    TORCH + "generated/{}.html": """torch.autocast torch.cat torch.compile torch.no_grad torch.vmap torch.manual_seed
        torch.nn.Module torch.nn.Linear torch.nn.parallel.DistributedDataParallel torch.optim.Adam
        torch.func.functional_call torch.jit.script torch.Generator""",
    TORCH + "{}.html": "torch.optim torch.distributed torch.distributions",
    TORCH + "tensors.html#{}": "torch.Tensor",
    TORCH + "tensor_attributes.html#{}": "torch.dtype torch.device",
    TORCH + "data.html#{}": """torch.utils.data.DataLoader torch.utils.data.TensorDataset torch.utils.data.Dataset
        torch.utils.data.IterableDataset""",
    TORCH + "distributions.html#{}": """torch.distributions.Distribution torch.distributions.Normal
        torch.distributions.distribution.Distribution torch.distributions.Poisson torch.distributions.NegativeBinomial
        torch.distributions.Gamma torch.distributions.StudentT torch.distributions.ContinuousBernoulli""",
    PYRO + "primitives.html#pyro.primitives.{last}": """pyro.sample pyro.param pyro.module pyro.plate pyro.factor
        pyro.deterministic pyro.clear_param_store pyro.enable_validation""",
    PYRO + "poutine.html#pyro.poutine.handlers.{last}": "pyro.condition pyro.do pyro.markov",
    PYRO + "inference_algos.html#pyro.infer.svi.{last}": "pyro.infer.SVI",
    PYRO + "inference_algos.html#pyro.infer.elbo.{last}": "pyro.infer.ELBO",
    PYRO + "inference_algos.html#pyro.infer.trace_elbo.{last}": "pyro.infer.Trace_ELBO",
    PYRO + "inference_algos.html#pyro.infer.traceenum_elbo.{last}": "pyro.infer.TraceEnum_ELBO",
    PYRO + "inference_algos.html#pyro.infer.predictive.{last}": "pyro.infer.Predictive",
    PYRO + "optimization.html": "pyro.optim",
    PYRO + "distributions.html": "pyro.distributions",
    PYTHON + "library/functions.html#{}": "int float bool str tuple list dict object",
    PYTHON + "library/constants.html#{}": "None",
    PYTHON + "library/pathlib.html#{}": "pathlib.Path",
    PYTHON + "library/os.html#{}": "os.PathLike",
    PYTHON + "library/collections.abc.html#{}": """collections.abc.Callable collections.abc.Iterable
        collections.abc.Iterator collections.abc.Mapping collections.abc.Sequence""",
}
OUTSIDE = {name: page.format(name, last=name.rpartition(".")[2]) for page, names in PAGES.items() for name in names.split()}
SHORT = {"SVI": "pyro.infer.SVI", "Trace_ELBO": "pyro.infer.Trace_ELBO", "Predictive": "pyro.infer.Predictive"}
SHORT |= {name.rpartition(".")[2]: name for name in OUTSIDE if ".data." in name}
SHORT |= {"DistributedDataParallel": "torch.nn.parallel.DistributedDataParallel", "nn.Module": "torch.nn.Module"}
HOMES = {"": pyro_vae, "nn": pyro_vae.nn, "plots": pyro_vae.plots, "errors": pyro_vae.errors}
BUILTINS = {name for name in OUTSIDE if "." not in name}  # linked in signatures, not in the text


def public_name(text: str) -> str | None:
    """`pyro_vae.nn.MLP` of `nn.MLP` or `pv.nn.MLP`, `pyro_vae.errors.MaskError` of `MaskError`; None of any other text."""
    name = re.sub(r"\(\)$", "", text).removeprefix("pv.").removeprefix("pyro_vae.")
    module, _, last = name.rpartition(".")
    homes = [home for home in HOMES if home == module or (not module and home in ("errors", "plots"))]
    return next((".".join(filter(None, ("pyro_vae", home, last))) for home in homes if last in HOMES[home].__all__), None)
