"""A part of a data set stands for all of it, also where that is sorted."""

import pytest
import torch

from pyro_vae.batches import first_element, picked
from pyro_vae.errors import EmptyBatchError
from pyro_vae.kernel import INFER


def pick(loader, num_data, plate=INFER):
    batches, count = picked(loader, num_data, first_element, plate)
    return [int(batch[0]) for batch in batches], count


def loader(num_batches, size):
    return (torch.full((size,), float(number)) for number in range(num_batches))


@pytest.mark.parametrize("num_batches", [1, 2, 3, 7, 10, 64, 1000])
@pytest.mark.parametrize("num_data", [1, 20, 55, 300])
def test_spread_evenly_and_just_enough(num_batches, num_data):
    numbers, count = pick(loader(num_batches, 10), num_data)
    assert count == num_batches and numbers == sorted(set(numbers))
    held = 10 * len(numbers)
    assert held >= min(num_data, 10 * num_batches)
    assert held < num_data + 10
    if len(numbers) > 1:
        steps = [b - a for a, b in zip(numbers, numbers[1:], strict=False)]
        assert max(steps) <= 2.01 * min(steps)  # every other batch is dropped from an even comb
        assert numbers[-1] >= num_batches * (1 - 2.01 / len(numbers)) - 1  # and it reaches to the end


def test_memory_holds_few_batches():
    alive = []

    class Batch(torch.Tensor):
        pass

    def batches():
        import weakref

        for number in range(2000):
            batch = torch.full((10,), float(number)).as_subclass(Batch)
            alive.append(weakref.ref(batch))
            yield batch
            assert sum(ref() is not None for ref in alive) < 25

    assert len(picked(batches(), 100, first_element, INFER)[0]) == 10


def test_whole_calls_count_as_one_datum():
    assert len(pick(loader(50, 10), 5, plate=None)[0]) == 5


def test_nothing_to_pick():
    with pytest.raises(EmptyBatchError):
        pick([], 10)
