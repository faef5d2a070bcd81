"""A collapse of the latents is noticed while a run trains."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ctrl_csc_hf import coding_rate
from ctrl_csc_hf.training.collapse import COLLAPSED, CollapseWatch, largest_rate


@pytest.mark.parametrize(("count", "dim"), [(8, 16), (16, 16), (64, 16)])
def test_the_largest_rate_is_that_of_orthogonal_vectors_equally_many_each(count: int, dim: int) -> None:
    z = torch.eye(dim, dtype=torch.float64).repeat(max(1, count // dim), 1)[:count]
    assert largest_rate(count, dim, 0.5) == pytest.approx(coding_rate(z, distortion=0.5).item(), rel=1e-9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        others = torch.nn.functional.normalize(torch.randn(count, dim, generator=generator, dtype=torch.float64))
        assert coding_rate(others, distortion=0.5) <= largest_rate(count, dim, 0.5) + 1e-9


def test_only_as_many_low_steps_in_a_row_are_a_collapse() -> None:
    watch = CollapseWatch(share=0.25, steps=3)
    rates = [1, 1, 9, 1, 1, 1, 1, 1, 1]
    warned = [step for step, rate in enumerate(rates) if watch.notice(rate, 10.0)]
    assert warned == [5, 8]
    never = CollapseWatch(share=0.0, steps=1)
    assert never.notice(0.0, 10.0) is None


def test_a_collapsing_run_warns_and_stops_where_asked(
    train: Callable[..., Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    # A share of 1 counts every step.
    flags = ("--max_train_steps", "6", "--collapse_share", "1", "--collapse_steps", "3", "--checkpointing_steps", "100")
    with caplog.at_level(logging.WARNING):
        train(*flags)
    assert sum("The latents have collapsed" in record.message for record in caplog.records) == 2
    with pytest.raises(SystemExit) as stop:
        train(*flags, "--stop_on_collapse", "True", output="stopped")
    assert stop.value.code == COLLAPSED
    assert (tmp_path / "stopped" / "checkpoint-4").is_dir()  # figures arrive a reading later
