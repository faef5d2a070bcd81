"""The order of the training images: each once an epoch, whatever the numbers of processes and loader workers.

A process divides its images over lanes, whose number depends on the data set and the number of processes alone. A lane
owns shards and a shuffle buffer, and gives its images chunk by chunk; the loader takes a chunk of each lane in turn.
Workers only serve lanes, so their number changes nothing. Where a process stands is a few integers a lane.
"""

import logging
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ctrl_csc_hf.latents.encoding import ROWS_AT_ONCE, ImageDataset, name_of, rows_of, undecoded

from .data import AUGMENTATIONS, decode

logger = logging.getLogger(__name__)

LANES = 16  # of a process, at most; more loader workers would have nothing to do
LEAST_PIECES = 4  # of a process: with fewer shards, each is divided, so that there is work for as many workers
CHUNK = 16  # images
READ_ATTEMPTS = 6
FIRST_PAUSE = 0.5  # seconds after a shard failed to be read; doubles each time
NAMED_UNREADABLE = 100  # of the images skipped, so many are remembered by name
EPOCHS_WITHOUT_IMAGES = 5  # may come where processes are many and shards small
FEW_IMAGES = 1000  # of which so many are taken, for the share of unreadable ones

Start = tuple[int, int, int]
Rows = list[tuple[str, dict[str, Any]]]  # what tells each image from all others of the data set, and its columns


@dataclass
class Place:
    """Where a process stands in its images, and how many it has seen.

    lanes: where each lane goes on. Of a stream: piece, row of its shard, and chunks given of the block of images that
        starts there; of a map-style data set: chunks given.
    next_lane: whose chunk comes next.
    taken: images of that chunk that are already in a batch.
    images, unreadable: numbers of images seen and skipped; the first of the latter by name.
    """

    lanes: list[Start]
    epoch: int = 0
    next_lane: int = 0
    taken: int = 0
    images: int = 0
    unreadable: int = 0
    unreadable_names: list[str] = field(default_factory=list)


@dataclass
class Chunk:
    """Neighbours in a lane: uint8 (m, 3, s, s), labels (m,) or None, those skipped, and where the lane then stands.

    Arrays: a tensor's way out of a worker takes the main process a round trip to that worker, longer than a copy of so
    few images.
    """

    lane: int
    end: Start
    pixels: np.ndarray
    labels: np.ndarray | None
    unreadable: list[str]


class ImageStream(IterableDataset):
    """Decoded images of one epoch of one process, as chunks, for `ImageLoader`.

    The order is a pure function of seed, epoch and the number of processes; augmentation, of seed, epoch and image. A
    map-style data set is mixed as a whole. Of a streamed one, shards are dealt to lanes anew in each epoch, and each
    lane mixes blocks of its images, reading the next block while it gives the last one away.

    A shard that cannot be read is tried again from the row reached, after a growing pause. An image that cannot be
    decoded is skipped, logged and counted.

    Args:
        dataset: what `load_images` or `hold_out` gives.
        image_column: column of the images.
        label_column: column of the labels, or None.
        image_size: side of the square results, in pixels.
        augmentation: "none"; "flip", left to right for half of the images; or "crop_and_flip", that and a
            crop of half to all of the area.
        shuffle_buffer: images of a streamed data set that a process keeps in memory to mix them.
        seed: of order and augmentation.
        rank: of this process.
        world_size: number of processes.

    Raises:
        ValueError: for a column that does not exist or holds something else, an empty data set, and arguments
            other than the above; while iterating, for a label that is null or outside of its classes.
        OSError: while iterating, for a shard that cannot be read.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        image_column: str,
        label_column: str | None,
        image_size: int,
        augmentation: str,
        shuffle_buffer: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if augmentation not in AUGMENTATIONS:
            raise ValueError(f"augmentation must be one of {AUGMENTATIONS}, got {augmentation!r}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), got rank={rank} and world_size={world_size}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        dataset, _, _ = undecoded(dataset, image_column, label_column or "none")
        self.num_lanes = LANES
        if isinstance(dataset, datasets.IterableDataset):
            self.parts = -(-LEAST_PIECES * world_size // dataset.num_shards)  # of each shard
            self.num_lanes = min(LANES, len(range(rank, dataset.num_shards * self.parts, world_size)))
            self.block = max(1, shuffle_buffer // (2 * self.num_lanes * CHUNK)) * CHUNK
        elif len(dataset) == 0:
            raise ValueError("the data set is empty: there must be at least one image")
        self.dataset = dataset
        self.image_column = image_column
        self.label_column = label_column
        self.num_classes = getattr(dataset.features.get(label_column), "num_classes", None)
        self.image_size = image_size
        self.augmentation = augmentation
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._place = torch.zeros(2 + 3 * self.num_lanes, dtype=torch.int64).share_memory_()  # workers live on

    def start_at(self, place: Place) -> None:
        """Choose epoch and start of the iterations that begin from now on."""
        self._place.copy_(torch.tensor([place.epoch, place.next_lane, *chain.from_iterable(place.lanes)]))

    def __iter__(self) -> Iterator[Chunk | None]:
        """Chunks of this worker's lanes in turn; None for a lane that has none left, so that turns stay in step."""
        worker = get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        epoch, next_lane, *starts = self._place.tolist()
        turns = range(index, -(-self.num_lanes // count) * count, count)  # lanes, and None past the last one
        chunks: dict[int, Iterator[tuple[Rows, Start]]] = {
            lane: self._chunks(epoch, lane, tuple(starts[3 * lane : 3 * lane + 3]))
            for lane in turns
            if lane < self.num_lanes
        }
        while chunks:
            for lane in turns:
                chunk = None
                if lane >= next_lane and lane in chunks:
                    found = next(chunks[lane], None)
                    if found is None:
                        del chunks[lane]
                    else:
                        chunk = self._decoded(epoch, lane, *found)
                yield chunk
            next_lane = 0  # the lanes before it had given theirs of the first turn

    def _chunks(self, epoch: int, lane: int, start: Start) -> Iterator[tuple[Rows, Start]]:
        """A lane's chunks from `start` on, and where it stands after each."""
        if isinstance(self.dataset, datasets.IterableDataset):
            return self._chunks_of_shards(epoch, lane, start)
        return self._chunks_of_table(epoch, lane, start)

    def _chunks_of_table(self, epoch: int, lane: int, start: Start) -> Iterator[tuple[Rows, Start]]:
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))[self.rank :: self.world_size]
        given = start[0]
        for first in range((given * self.num_lanes + lane) * CHUNK, len(order), self.num_lanes * CHUNK):
            indices = order[first : first + CHUNK].tolist()
            given += 1
            rows = zip(map(str, indices), rows_of(self.dataset[indices]), strict=True)
            yield list(rows), (given, 0, 0)

    def _chunks_of_shards(self, epoch: int, lane: int, start: Start) -> Iterator[tuple[Rows, Start]]:
        pieces = self._pieces(epoch)[lane]
        piece, first_row, given = start
        rows = self._rows_of_pieces(pieces, piece, first_row)
        block = list(islice(rows, self.block))
        while block:
            piece, first_row, _ = block[0]
            generator = np.random.default_rng((self.seed, epoch, *pieces[piece], first_row))
            order = generator.permutation(len(block))
            next_block: list[tuple[int, int, dict[str, Any]]] = []
            for first in range(0, len(block), CHUNK):
                next_block += islice(rows, CHUNK)  # at the pace of their use, lest all wait for a whole block
                if first < given * CHUNK:
                    continue
                chunk = [block[index] for index in order[first : first + CHUNK]]
                end = (piece, first_row, first // CHUNK + 1)
                if first + CHUNK >= len(block):
                    end = (*next_block[0][:2], 0) if next_block else (len(pieces), 0, 0)
                yield [(f"{pieces[p][0]}:{row}", columns) for p, row, columns in chunk], end
            block, given = next_block, 0

    def _pieces(self, epoch: int) -> list[list[tuple[int, int]]]:
        """By lane of this process: shard, and which of its `parts`."""
        pieces = [(shard, part) for shard in range(self.dataset.num_shards) for part in range(self.parts)]
        order = np.random.default_rng((self.seed, epoch)).permutation(len(pieces))[self.rank :: self.world_size]
        return [[pieces[index] for index in order[lane :: self.num_lanes]] for lane in range(self.num_lanes)]

    def _rows_of_pieces(
        self, pieces: list[tuple[int, int]], piece: int, first_row: int
    ) -> Iterator[tuple[int, int, dict[str, Any]]]:
        for index in range(piece, len(pieces)):
            shard, part = pieces[index]
            for row, columns in self._rows_of_shard(shard, first_row):
                if row % self.parts == part:
                    yield index, row, columns
            first_row = 0

    def _rows_of_shard(self, shard: int, first_row: int) -> Iterator[tuple[int, dict[str, Any]]]:
        failures = 0
        while True:
            try:
                # `iter` gives the shard as it is; plain iteration would divide it over the workers once more.
                batches = self.dataset.shard(self.dataset.num_shards, shard).iter(ROWS_AT_ONCE)
                rows = (columns for batch in batches for columns in rows_of(batch))
                for row, columns in enumerate(rows):
                    if row >= first_row:
                        yield row, columns
                        first_row, failures = row + 1, 0
                return
            except Exception as error:  # every format's reader and file system raises its own
                failures += 1
                where = f"shard {shard} of {self.dataset.num_shards} cannot be read at row {first_row}"
                if failures == READ_ATTEMPTS:
                    raise OSError(f"{where}, tried {READ_ATTEMPTS} times: {error!r}") from error
                pause = FIRST_PAUSE * 2 ** (failures - 1)
                logger.warning("%s, next attempt in %g s: %r", where, pause, error)
                time.sleep(pause)

    def _decoded(self, epoch: int, lane: int, rows: Rows, end: Start) -> Chunk:
        pixels, labels, unreadable = [], [], []
        for key, columns in rows:
            encoded = columns[self.image_column]
            generator = random.Random(f"{self.seed} {epoch} {key}")
            try:
                pixels.append(decode(encoded, self.image_size, self.augmentation, generator))
            except Exception as error:  # PIL's decoders raise nearly everything on broken files
                unreadable.append(name_of(encoded, key))
                logger.warning("unreadable image skipped, %s: %r", unreadable[-1], error)
                continue
            if self.label_column is not None:
                labels.append(self._label(columns[self.label_column], name_of(encoded, key)))
        stacked = np.stack(pixels) if pixels else np.empty((0, 3, 0, 0), np.uint8)
        labelled = None if self.label_column is None else np.array(labels, np.int64)
        return Chunk(lane, end, stacked, labelled, unreadable)

    def _label(self, label: int | None, name: str) -> int:
        if label is None or not 0 <= label < (self.num_classes or math.inf):
            allowed = f"in [0, {self.num_classes})" if self.num_classes else "of at least 0"
            raise ValueError(
                f"label_column={self.label_column!r} must hold integers {allowed}, but {name} has the label {label}: "
                "leave such images out of the data set, or do without labels"
            )
        return label


class ImageLoader:
    """Batches of a stream: without end when iterated, the rest of one epoch by `epoch`.

    A batch is `pixels`, uint8 (n, 3, s, s), and `labels`, int64 (n,), if there are labels. Batches go on over the end
    of an epoch, so that none is smaller and no image is left out. What is in `place` is saved in a checkpoint; a loader
    to which it is given goes on with the next image, whatever its number of workers.

    Args:
        stream: of this process. Accelerate must not divide it once more.
        batch_size: images a batch.
        num_workers: processes that decode images; 0 decodes in this one.
        max_unreadable_share: of the images seen, 1,000 at least.

    Raises:
        ValueError: while iterating, where there is no image that can be read, and where the share of unreadable ones
            is too large; the message lists them.
    """

    def __init__(
        self, stream: ImageStream, *, batch_size: int, num_workers: int, max_unreadable_share: float = 0.01
    ) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.max_unreadable_share = max_unreadable_share
        self.place = Place([(0, 0, 0)] * stream.num_lanes)
        num_workers = min(num_workers, stream.num_lanes)
        self._chunks = DataLoader(
            stream,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=_leave_signals_to_the_main_process,
            # Two batches ahead, between all workers.
            prefetch_factor=max(2, -(-2 * batch_size // (CHUNK * num_workers))) if num_workers else None,
        )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self._batches(endless=True)

    def epoch(self) -> Iterator[dict[str, Tensor]]:
        """Batches to the end of this epoch, the last one as small as it is."""
        return self._batches(endless=False)

    def _batches(self, endless: bool) -> Iterator[dict[str, Tensor]]:
        parts: list[tuple[np.ndarray, np.ndarray | None]] = []
        missing = self.batch_size
        while True:
            for chunk in self._rest_of_epoch():
                while self.place.taken < len(chunk.pixels):
                    part = slice(self.place.taken, self.place.taken + missing)
                    parts.append((chunk.pixels[part], None if chunk.labels is None else chunk.labels[part]))
                    self.place.taken += len(parts[-1][0])
                    missing -= len(parts[-1][0])
                    if missing == 0:  # only now does every image before `place` lie in a batch
                        yield _batch(parts)
                        parts, missing = [], self.batch_size
            if not endless:
                if parts:
                    yield _batch(parts)
                return

    def _rest_of_epoch(self) -> Iterator[Chunk]:
        """Chunks from `place` on; each counts as seen when the next one is asked for."""
        place = self.place
        self.stream.start_at(place)
        for chunk in self._chunks:
            if chunk is None:
                continue
            yield chunk
            place.lanes[chunk.lane] = chunk.end
            place.next_lane, place.taken = chunk.lane + 1, 0
            place.images += len(chunk.pixels)
            place.unreadable += len(chunk.unreadable)
            names = dict.fromkeys(place.unreadable_names + chunk.unreadable)  # each once
            place.unreadable_names = list(names)[:NAMED_UNREADABLE]
            if place.unreadable > self.max_unreadable_share * max(FEW_IMAGES, place.images + place.unreadable):
                raise ValueError(
                    f"{place.unreadable} of {place.images + place.unreadable} images cannot be read, more than "
                    f"max_unreadable_share={self.max_unreadable_share:g} allows: {', '.join(place.unreadable_names)}"
                )
        place.epoch, place.next_lane, place.lanes = place.epoch + 1, 0, [(0, 0, 0)] * len(place.lanes)
        if place.images == 0 and place.epoch >= EPOCHS_WITHOUT_IMAGES:
            raise ValueError(
                f"process {self.stream.rank} found no image that can be read in {place.epoch} epochs: the data set is "
                "empty, it has fewer images than there are processes, or see the warnings"
            )


def _leave_signals_to_the_main_process(_: int) -> None:
    """Ctrl-C goes to the whole process group, and the run still needs its workers for the last step."""
    os.setpgrp()


def _batch(parts: list[tuple[np.ndarray, np.ndarray | None]]) -> dict[str, Tensor]:
    batch = {"pixels": torch.from_numpy(np.concatenate([pixels for pixels, _ in parts]))}
    if parts[0][1] is not None:
        batch["labels"] = torch.from_numpy(np.concatenate([labels for _, labels in parts if labels is not None]))
    return {name: tensor.pin_memory() for name, tensor in batch.items()} if torch.cuda.is_available() else batch
