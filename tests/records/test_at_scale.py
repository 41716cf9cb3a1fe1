"""Data larger than memory: nothing but the record grows with N."""

import sys
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from records_at_scale import bytes_of, evaluated


def peak_beyond_the_record(num_data):
    tracemalloc.start()
    try:
        record = evaluated(num_data)
        return tracemalloc.get_traced_memory()[1], bytes_of(record)
    finally:
        tracemalloc.stop()


def test_python_keeps_no_more_than_small_records():
    """Tensors are not in what Python traces: objects are, and there is one small record per batch of 1,000."""
    evaluated(2_000)
    small, _ = peak_beyond_the_record(2_000)
    large, size = peak_beyond_the_record(20_000)
    assert large - small < size, (small, large, size)
