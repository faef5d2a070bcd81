"""Notices a collapse of the latents while a run trains: their coding rate stays near that of a single vector."""

import math
from dataclasses import dataclass

COLLAPSED = 3  # what a run ends with that stops for it
ADVICE = (
    "The latents have collapsed: R(Z) was below {share:.0%} of {largest:.1f} nats, its largest possible value, for "
    "{steps} steps, last {rate:.2f} nats. What helps: a larger decoder_consistency, objective 'unsupervised', which "
    "adds R(Z) to what the encoder raises, or a smaller encoder_learning_rate."
)


def largest_rate(count: int, dim: int, distortion: float) -> float:
    """The largest coding rate of `count` unit vectors in `dim` dimensions, in nats: of a flat spectrum."""
    rank = min(count, dim)
    return rank / 2 * math.log1p(dim / (rank * distortion))


@dataclass
class CollapseWatch:
    """Counts the steps in a row with a coding rate below `share` of the largest possible one.

    Args:
        share: 0 for a watch that never counts.
        steps: in a row, that are a collapse.
    """

    share: float
    steps: int
    count: int = 0

    def notice(self, rate: float, largest: float) -> str | None:
        """Advice at the step that makes it a collapse, and again after every `steps` more.

        Args:
            rate: R(Z) of the step's batch, in nats.
            largest: `largest_rate` of that batch.
        """
        self.count = self.count + 1 if rate < self.share * largest else 0
        if self.count and self.count % self.steps == 0:
            return ADVICE.format(share=self.share, largest=largest, steps=self.count, rate=rate)
        return None
