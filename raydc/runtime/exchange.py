"""What the training workers send one another: the gradients of each step, and when that outweighs their arithmetic.

A step has `batch_rows` rows over all workers, so more workers share the arithmetic of a step but not its gradients.
Letters: W workers, G bytes of gradients, B bytes a second.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

from raydc.config import Config
from raydc.core.objectives.table import info

ASSUMED_BYTES_PER_SECOND = 1.25e9
"""10 Gbit/s, where nothing is known of the network."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """The gradients of a phase."""

    phase: Literal["pretrain", "refine"]
    gradient_bytes: int
    """One step's, in float32: what each worker has, and all must add up."""

    steps: int
    """In an epoch."""

    batch_rows: int
    row_flop: float
    """Arithmetic on a row in a step, forward and backward."""

    def step_bytes(self, workers: int) -> float:
        """Return what a worker sends in a step, and as much it receives: 2 (W - 1) / W G in a ring."""
        return 2.0 * (workers - 1) / workers * self.gradient_bytes

    def epoch_seconds(self, workers: int, bytes_per_second: float) -> float:
        """Return how long the gradients of an epoch take."""
        return self.steps * self.step_bytes(workers) / bytes_per_second

    def least_step_seconds(self, bytes_per_second: float) -> float:
        """Return how long a step must take one worker alone, or more workers make it slower.

        With C seconds of arithmetic W workers need C / W + 2 (W - 1) / W G / B. That is below C, and falls with W, if
        and only if C is above 2 G / B.
        """
        return 2.0 * self.gradient_bytes / bytes_per_second

    def step_seconds(self, flop_per_second: float) -> float:
        """Return how long a step takes one worker alone."""
        return self.batch_rows * self.row_flop / flop_per_second

    def line(self, workers: int, bytes_per_second: float, flop_per_second: float | None) -> str:
        """Return the exchange as text, and whether more workers help.

        Args:
            workers: W.
            bytes_per_second: of a worker's network.
            flop_per_second: that a worker reaches in a step; None where it is not known.
        """
        sent = self.steps * self.step_bytes(workers) / 2**30
        gbit = 8e-9 * bytes_per_second
        least = self.least_step_seconds(bytes_per_second)
        text = (
            f"{self.phase}: {sent:,.1f} GiB an epoch from each of {workers} workers, "
            f"{self.epoch_seconds(workers, bytes_per_second):,.0f} s at {gbit:g} Gbit/s"
        )
        if flop_per_second is None:
            return f"{text}; more workers help if a step takes one alone above {1e3 * least:.3g} ms"
        alone = self.step_seconds(flop_per_second)
        if alone > least:
            return text
        rows = int(self.batch_rows * least / alone) + 1
        return (
            f"{text}; more workers make an epoch SLOWER: a step takes one alone {1e3 * alone:.3g} ms, its gradients up "
            f"to {1e3 * least:.3g} ms. Set fit.num_workers=1, or {self.phase}.batch_rows above {rows:,}"
        )


def exchanges(config: Config, num_rows: int, dim: int) -> list[Exchange]:
    """Return those of the phases that a fit with these settings has, on so many rows of this width."""
    found: list[Exchange] = []
    widths, leaves = config.encoder_widths(dim), config.cluster.num_leaves
    encoder = sum(a * b for a, b in itertools.pairwise(widths))
    if config.learns and config.pretrain.num_epochs:
        rows = config.pretrain.batch_rows
        found.append(
            Exchange(
                phase="pretrain",
                gradient_bytes=4 * 2 * encoder,
                steps=-(-num_rows // rows),
                batch_rows=rows,
                row_flop=3 * 2.0 * 2 * encoder,
            )
        )
    if config.refines and config.refine.num_epochs:
        about, rows = info(config.fit.objective), config.refine.batch_rows
        heads = config.head.num_heads if about.many_heads else 1
        weights = leaves * widths[-1] * heads + encoder * (2 if about.needs_decoder else 1)
        found.append(
            Exchange(
                phase="refine",
                gradient_bytes=4 * weights,
                steps=-(-num_rows // rows),
                batch_rows=rows,
                row_flop=3 * 2.0 * weights,
            )
        )
    return found


def lake_passes(config: Config, *, streamed: bool) -> int:
    """Return how often fit reads its rows from the lake: once where they are resident, else about once for each pass.

    Left out are k-means moves, the k-means of dcn between and after its epochs, and the starts of vade and distill.
    """
    if not streamed:
        return 1
    passes = 0
    if config.learns:
        layers = len(config.autoencoder.hidden_dims) + 1
        # The sample of the baseline, that of the start, and the codes, which are kept.
        passes += 3 + config.pretrain.num_epochs
        passes += config.pretrain.layer_epochs * layers if config.pretrain.layerwise else 0
    else:
        passes += 1 + config.cluster.num_iterations
    if config.refines:
        kind = info(config.fit.objective).passes
        extra = {"none": 0, "one": 1, "refreshes": config.refine.refreshes_per_epoch}[kind]
        passes += config.refine.num_epochs * (1 + extra)
    # The statistics of the leaves.
    return passes + 1
