"""Numbers of batches, as ``batch_idx`` shows them: one per batch, the same in every hook, on every rank, after a restart.

Files and tables are named by them, so two batches of a job must not share one, on whatever rank they are computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from lightning_gpuorch.predictions.loading.source import Span
from lightning_gpuorch.predictions.storage.layout import LoaderLayout

DIGEST_RANGE = 10**9
"""Dynamic batches that begin with the same sample are told apart by a number below this."""


def number_of_span(span: Span, layout: LoaderLayout) -> int:
    """The number of one of the loader's batches: its place in the loader, as a single device counts.

    Where a batch is computed in pieces (samples that are isolated or left out, chunks that were cut for another batch
    size), the piece that begins it has its number. Any other has the number of batches plus the number of its first sample:
    beyond all batches, and the same whenever it is computed.
    """
    size = layout.batch_size
    if size is None or span.first_unit % size == 0:
        return span.batch_index
    return layout.num_batches + span.first_unit


def number_of_dynamic_batch(samples: Sequence[int]) -> int:
    """The number of a batch that is none of the loader's: of exactly these samples.

    A batch of other samples has another number, also one that is formed of them after a restart; the same samples have the
    same. It is ``DIGEST_RANGE`` times the first sample plus a digest of all, so that it sorts as the dataset does.

    Args:
        samples: Number of each sample in the job.
    """
    samples = sorted(samples)
    digest = hashlib.blake2b(np.asarray(samples, dtype="<i8").tobytes(), digest_size=8).digest()
    return samples[0] * DIGEST_RANGE + int.from_bytes(digest, "little") % DIGEST_RANGE
