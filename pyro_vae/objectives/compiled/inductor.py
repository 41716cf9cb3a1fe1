"""Compile a graph to a function, by torch's inductor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .options import Options
from .refusals import named_compiling


def compiled_function(module: fx.GraphModule, inputs: Sequence[Tensor], options: Options) -> Callable[..., Any]:
    if options.backend == "eager":
        return module.forward
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        from torch import _inductor  # the import takes a second, so it is done only where it is needed

    settings: dict[str, Any] = {}
    if all(t.device.type == "cpu" for t in inputs):
        settings["layout_optimization"] = False  # the channels-last layout made small convolutions slower on CPUs
    if options.settings.get("mode") is not None:
        settings |= _inductor.list_mode_options(options.settings["mode"])
    # Draw from torch's random state, so that the numbers are the same as uncompiled.
    settings |= {**options.settings.get("options", {}), "fallback_random": True}
    # Without recording gradients, or torch would differentiate the gradients again.
    with torch.no_grad(), named_compiling(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        function: Callable[..., Any] = _inductor.compile(module, list(inputs), options=settings)
    if not settings.get("triton.cudagraphs"):
        return function

    def replay(*inputs: Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return function(*inputs)

    return replay
