"""What is looked at before a job goes on in a directory: parts that are damaged, or lack samples, are computed again.

How much is read is a choice (:data:`ResumeCheck`). A part whose file has not the length that its header tells, or whose
header's checksum does not fit, is found in any case: so is all that an interrupted copy or a lost block at the end leaves.
A bit that has flipped within a part is found only where the part is read as a whole, here or when its predictions are used.
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from lightning_gpuorch.errors import CorruptPartError
from lightning_gpuorch.predictions.storage.journal import PartJournal
from lightning_gpuorch.predictions.storage.layout import LoaderLayout

log = logging.getLogger(__name__)

ResumeCheck = Literal["headers", "sampled", "all"]

SAMPLED_PARTS = 64
"""Parts that are read as a whole where a sample is: another one each time."""
_CHECKING_THREADS = 4
_SHOWN = 20


def prepare(journal: PartJournal, layout: LoaderLayout, check: ResumeCheck) -> int:
    """Look at what there is of a dataloader, so that a job can go on; see :func:`set_right`, whose findings are logged.

    Returns:
        Number of samples that have an error in place of a prediction.
    """
    journal.sweep_temporaries()
    damaged, incomplete, num_errors = set_right(journal, layout, check)
    for error in damaged:
        log.warning("%s It is set aside as *.damaged, and its chunk is computed again.", error)
    if incomplete:
        more = f" and {len(incomplete) - _SHOWN} more" if len(incomplete) > _SHOWN else ""
        log.warning(
            "chunks %s%s lack samples that an earlier run gave up; they are tried again", incomplete[:_SHOWN], more
        )
    return num_errors


def set_right(
    journal: PartJournal, layout: LoaderLayout, check: ResumeCheck
) -> tuple[list[CorruptPartError], list[int], int]:
    """Rename damaged parts, and remove those in which samples were given up, so that their chunks count as missing.

    Needs no torch. Not while a job writes here.

    Args:
        journal: The parts.
        layout: The layout in force.
        check: How much is read.

    Returns:
        What is wrong with parts, one error each, which names the file that is kept as ``part-....gpq.damaged``; the chunks
        whose parts were removed; and how many samples have an error in place of a prediction.

    Raises:
        CorruptPartError: There are parts of which it is not known what their chunks are.
        NewerFormatError: A newer version has written a part.
        PredictionStorageError: The directory cannot be read, or a part not renamed or removed.
    """
    chunks = sorted(journal.done())
    decided = layout.num_decided_chunks
    if chunks and decided is not None and chunks[-1] >= decided:
        raise CorruptPartError(
            f"{journal.path(chunks[-1])} belongs to a chunk whose size is not known: the stretch-*.json files that are "
            f"there cover {decided} chunks, so one is missing. Restore it, or delete the parts from "
            f"{journal.path(decided).name} on."
        )
    whole = _read_as_a_whole(chunks, check)
    damaged, incomplete, num_errors = [], [], 0
    with ThreadPoolExecutor(_CHECKING_THREADS, "gpuorch-check") as pool:
        found = list(pool.map(functools.partial(_judge, journal, layout, whole), chunks))
    for chunk, verdict in zip(chunks, found, strict=True):
        if isinstance(verdict, CorruptPartError):
            journal.set_aside(chunk)
            damaged.append(verdict)
        elif verdict is None:
            journal.discard(chunk)
            incomplete.append(chunk)
        else:
            num_errors += verdict
    return damaged, incomplete, num_errors


def _read_as_a_whole(chunks: Sequence[int], check: ResumeCheck) -> frozenset[int]:
    if check == "headers":
        return frozenset()
    if check == "all" or len(chunks) <= SAMPLED_PARTS:
        return frozenset(chunks)
    return frozenset(random.SystemRandom().sample(chunks, SAMPLED_PARTS))


def _judge(
    journal: PartJournal, layout: LoaderLayout, whole: frozenset[int], chunk: int
) -> CorruptPartError | int | None:
    """What is wrong with a part, or how many errors it holds; None if it has not all of its chunk."""
    found = journal.check(chunk, chunk in whole)
    if isinstance(found, CorruptPartError):
        return found
    return len(found.entries.errors) if found.covers(layout, chunk) else None
