"""log q(z) of the aggregated posterior at draws of many data: a streaming sum over the data, in bounded memory."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import NonFiniteError, StructureError
from ..evaluation import gathered, rank_and_size
from ..isolation import isolated
from ..kernel import Pair
from .draws import BatchDraws, LogQ, Rows

LOST = 1e-30  # in single precision, a sum this far below its largest possible term has lost terms to underflow
# numbers of log q by dimension in a block: small enough for the cache of a processor
BLOCK_BYTES = {"cpu": 2**19, "cuda": 2**28}


class Mixture:
    """log q(z_i|x_i) and the log of the sum over j != i of q(z_i|x_j), for R rows.

    Both for z as a whole, and for each dimension if possible.

    :param batches: of the data; the columns.
    :param chosen: the data of each batch whose draws are the rows, as indices into the batch, on the CPU.
    :param by_dimension: whether each dimension has a separate density.
    :param labels: F ways to divide the data into groups: group numbers from 0, (N,) each, on the CPU. Sums over the other
        data of the same group are then computed too.
    """

    def __init__(
        self,
        batches: Sequence[BatchDraws],
        chosen: Sequence[Tensor],
        by_dimension: bool,
        labels: Sequence[Tensor] = (),
    ) -> None:
        self.batches, self.chosen, self.rows = batches, chosen, chosen_rows(batches, chosen)
        owners = owners_of(batches, chosen)
        self.owners = torch.cat(list(owners))
        self.limits = [0, *itertools.accumulate(len(part) for part in owners)]  # the rows of each batch
        columns = 1 + by_dimension * len(batches[0].units)
        device = batches[0].log_prior.device
        self.own = torch.full((len(self.owners), columns), -math.inf, dtype=torch.double, device=device)
        self.others = self.own.clone()
        self.labels = [label.to(device) for label in labels]
        # like `others`, but only over data with the label of the row's datum
        self.alike = [self.own.clone() for _ in labels]
        self.counts = torch.zeros(len(self.owners), 1, dtype=torch.double, device=device)

    def run(self, pair: Pair, *, within: bool, progress: bool) -> None:
        """Add up all pairs of rows and columns, or only those within a batch (`within`). The guide may run again."""
        with isolated(pair.model, pair.guide, devices=[self.own.device]):
            if rank_and_size()[1] == 1:
                self._add_up(within, progress)
            else:
                self._share_out(within, progress)
        self._check()

    def _add_up(self, within: bool, progress: bool) -> Tensor:
        """The sums of the rows of this process, and a mask of these rows, (R,)."""
        rank, size = rank_and_size()
        num_rows = len(self.owners)
        mine = torch.zeros(num_rows, dtype=torch.bool, device=self.own.device)  # the rows that this process adds up
        spans = list(itertools.pairwise(self.limits)) if within else [(0, num_rows)] * len(self.batches)
        num_pairs = sum(batch.size * (stop - start) for batch, (start, stop) in zip(self.batches, spans, strict=True))
        first = 0
        hidden = not progress or rank > 0
        with tqdm(total=num_pairs, desc="aggregated posterior", unit="pair", unit_scale=True, disable=hidden) as bar:
            for place, (batch, (start, stop)) in enumerate(zip(self.batches, spans, strict=True)):
                blocks = self._blocks(start, stop)[(rank - place if within else rank) % size :: size]
                if blocks:
                    with batch.columns.opened() as log_q:
                        for block in blocks:
                            self._add(log_q, block, first, batch.size)
                            mine[block] = True
                bar.update(batch.size * (stop - start))
                first += batch.size
        return mine

    def _share_out(self, within: bool, progress: bool) -> None:
        """In a process group each process adds up some of the rows, and receives the others."""
        tables = [self.own, self.others, self.counts, *self.alike]

        def compute() -> tuple[Tensor, list[Tensor]]:
            mine = self._add_up(within, progress)
            return mine, [table[mine] for table in tables]

        for rows, parts in gathered("the aggregated posterior", compute):
            for table, part in zip(tables, parts, strict=True):
                table[rows] = part

    def _blocks(self, start: int, stop: int) -> list[slice]:
        """Blocks of rows, the same for all batches, of any size; each block belongs to one process."""
        largest = max(batch.size for batch in self.batches)
        row_bytes = largest * sum(rows[0].numel() * rows.element_size() for rows in self.rows.values())
        length = max(BLOCK_BYTES.get(self.own.device.type, BLOCK_BYTES["cuda"]) // max(row_bytes, 1), 1)
        return [slice(first, min(first + length, stop)) for first in range(start, stop, length)]

    def _add(self, log_q: LogQ, block: slice, first: int, size: int) -> None:
        joint, by_dimension = log_q({name: rows[block] for name, rows in self.rows.items()})
        columns = self.own.shape[1] - 1
        parts = [(joint.unsqueeze(-1), slice(0, 1))]
        if columns:
            assert by_dimension is not None
            parts.append((by_dimension, slice(1, None)))
        place = self.owners[block] - first
        mine = ((place >= 0) & (place < size)).nonzero().squeeze(1)
        place = place[mine].to(joint.device)
        mine = mine.to(joint.device)
        for part, into in parts:
            part = part.contiguous()  # contiguous: an expanded view cannot be written to
            if len(mine):
                self.own[block, into][mine] = part[mine, place].double()
                part[mine, place] = -math.inf
            if self.labels:
                groups = [label[self.owners[block]].unsqueeze(1) == label[first : first + size] for label in self.labels]
                for alike, found in zip(self.alike, log_sums_exp(part, groups), strict=True):
                    alike[block, into] = torch.logaddexp(alike[block, into], found.double())
            self.others[block, into] = torch.logaddexp(self.others[block, into], log_sum_exp(part).double())
        self.counts[block] += size
        self.counts[block][mine] -= 1

    def _check(self) -> None:
        if bool((self.own.isnan() | (self.own.abs() == math.inf) | self.others.isnan() | (self.others == math.inf)).any()):
            raise NonFiniteError(
                "the guide's density for one datum, at a draw for another datum, is NaN or infinite: look for NaN in "
                "parameters, or for a scale that underflows to 0"
            )

    def by_datum(self, values: Tensor) -> Tensor:
        """Reorder rows, (R, ...), to particles and data, (K, n, ...)."""
        num_particles = len(self.batches[0].log_prior)
        parts = values.split([num_particles * len(data) for data in self.chosen])
        return torch.cat([part.unflatten(0, (num_particles, -1)) for part in parts if len(part)], 1)

    def log_q(self, aggregate: str, num_data: int) -> Tensor:
        """log q(z) of each row and log q(z_d) of its dimensions: (R, 1 + D)."""
        if aggregate == "leave-one-out":
            return self.others - self.counts.log()
        # Exact where the sum has all other data: each then has the weight 1/N.
        share = math.log(max(num_data - 1, 1)) - self.counts.clamp(min=1.0).log()
        return torch.logaddexp(self.own, self.others + share) - math.log(num_data)

    def log_q_alike(self, aggregate: str) -> Tensor:
        """log q(z) of each row under the data with the same label only, (R, F, 1 + D). Needs all pairs."""
        found = []
        for label, alike in zip(self.labels, self.alike, strict=True):
            count = label.bincount()[label[self.owners]].double().unsqueeze(1)
            if aggregate == "leave-one-out":
                found.append(alike - (count - 1).log())
            else:
                found.append(torch.logaddexp(self.own, alike) - count.log())
        return torch.stack(found, 1)


def check_batches(batches: Sequence[BatchDraws], aggregate: str) -> None:
    num_data = sum(batch.size for batch in batches)
    shapes = [{name: rows.shape[1:] for name, rows in batch.rows.items()} for batch in batches]
    if any(shape != shapes[0] for shape in shapes):
        raise StructureError(
            f"the latents differ in their shapes from batch to batch ({shapes[0]} and others), so they have no common "
            "aggregated posterior: pass data of one shape"
        )
    if num_data < 2 and aggregate != "full":
        raise StructureError(f"aggregate='{aggregate}' needs at least two data: pass more data")
    if aggregate == "minibatch" and any(batch.size < 2 for batch in batches):
        raise StructureError(
            "a batch has only one datum, so there are no others in it to estimate the aggregated posterior from: pass "
            "batches of at least 2 (drop_last=True in a DataLoader), or aggregate='full'"
        )


def chosen_rows(batches: Sequence[BatchDraws], chosen: Sequence[Tensor]) -> Rows:
    """The draws for the chosen data, in the order of batches, within a batch in the order of particles."""
    rows = {}
    for name in batches[0].rows:
        parts = []
        for batch, data in zip(batches, chosen, strict=True):
            part = batch.rows[name].unflatten(0, (-1, batch.size))
            parts.append((part if len(data) == batch.size else part[:, data.to(part.device)]).flatten(0, 1))
        rows[name] = torch.cat(parts)
    return rows


def owners_of(batches: Sequence[BatchDraws], chosen: Sequence[Tensor]) -> list[Tensor]:
    """The indices of the data that the rows were drawn for, by batch."""
    owners, first = [], 0
    for batch, data in zip(batches, chosen, strict=True):
        owners.append((data + first).repeat(len(batch.log_prior)))
        first += batch.size
    return owners


def mean_cost(batches: Sequence[BatchDraws]) -> float:
    """Decoder evaluations per datum."""
    return sum(batch.cost * batch.size for batch in batches) / sum(batch.size for batch in batches)


def log_sum_exp(terms: Tensor) -> Tensor:
    """Log-sum-exp over the data, (R, B, C) to (R, C), in place: most of the time is spent here."""
    top = terms.amax(1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    return terms.sub_(top).exp_().sum(1).log_().add_(top.squeeze(1))


def log_sums_exp(terms: Tensor, groups: Sequence[Tensor]) -> list[Tensor]:
    """Log-sum-exp over the data of the group of each row, (R, B, C) to (R, C), for each division into groups (R, B)."""
    top = terms.amax(1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    weights = (terms - top).exp_()
    found = []
    for group in groups:
        total = (weights * group.unsqueeze(-1)).sum(1)
        log_sum = total.log().add_(top.squeeze(1))
        far = ((total < LOST).any(1) & group.any(1)).nonzero().squeeze(1)
        if len(far):  # all values of the group are far below the largest: subtract the largest of the group
            log_sum[far] = log_sum_exp(terms[far].masked_fill(~group[far].unsqueeze(-1), -math.inf))
        found.append(log_sum)
    return found
