"""Leave-one-out predictive scores of models with latents outside the plate of the data."""

from .leave_one_out import LeaveOneOut
from .leave_one_out_result import LeaveOneOutResult

__all__ = ["LeaveOneOut", "LeaveOneOutResult"]
