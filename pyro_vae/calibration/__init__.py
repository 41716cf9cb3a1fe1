"""Calibration of a guide on data simulated from the model."""

from .calibration import Calibration
from .guide_calibration import GuideCalibration

__all__ = ["Calibration", "GuideCalibration"]
