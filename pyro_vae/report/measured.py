"""What `diagnose` measures: the records that findings, numbers and pictures are made from."""

from __future__ import annotations

from dataclasses import dataclass

from ..calibration import Calibration
from ..evidence import SelfCheckResult
from ..gaps import Gaps
from ..latent import Surgery, UnitActivity
from ..samples import SampleCheckResult
from ..simulate import Reconstruction, Simulation


@dataclass(frozen=True, eq=False)
class Measured:
    """The records of a diagnosis; `None` where a part was left out. `Diagnosis` says what each is about."""

    test: Gaps
    train: Gaps
    units: UnitActivity | None
    surgery: Surgery | None
    self_check: SelfCheckResult | None
    calibration: Calibration | None
    samples: SampleCheckResult | None
    simulation: Simulation | None
    reconstruction: Reconstruction | None
