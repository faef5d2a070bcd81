"""A training step reads no value of its device, its figures arrive in order, and it launches few kernels."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ctrl_csc_hf import CtrlCscConfig, CtrlCscModel
from ctrl_csc_hf.objectives.closed_loop import ClosedLoop, ClosedLoopObjective, player_parameters
from ctrl_csc_hf.training.ema import AverageOfWeights
from ctrl_csc_hf.training.steps import StepFigures, make_adam, set_learning_rate
from ctrl_csc_hf.training.warmup import Descent, deconvolution_error, sparse_coding_energy

# Operations that read a value, or whose result has a size that depends on one, and the way of Python's values to a
# device.
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "bincount", "lift_fresh"}
# Operations that launch nothing: views, new memory, the profiler's marks.
NO_KERNEL = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "empty", "empty_like",
    "empty_strided", "expand", "new_empty", "new_empty_strided", "permute", "promote_types", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_record_function_enter_new",
    "_record_function_exit",
}  # fmt: skip


class Dispatches(TorchDispatchMode):
    """Counts what is launched; what would make a GPU wait is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        assert name not in WAITS, f"{name} waits for the device"
        if name not in NO_KERNEL:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def steps_of(model: CtrlCscModel, **terms: Any) -> dict[str, Callable[[Tensor], dict[str, Tensor]]]:
    """The steps of training/train.py, with their average of weights, by phase."""
    descents = [Descent(loss, model, 100, 1e-3) for loss in (sparse_coding_energy, deconvolution_error)]
    players = [make_adam(part, 1e-4) for part in player_parameters(model)]
    average = AverageOfWeights(model.parameters(), 0.99)
    objective = ClosedLoopObjective(**{"decoder_consistency": 20.0} | terms)
    loop = ClosedLoop(model, objective, *players)

    def game(images: Tensor) -> dict[str, Tensor]:
        for optimizer in players:
            set_learning_rate(optimizer, 1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            played = loop.step(images)
        average.advance()
        average.update(model.parameters())
        return vars(played)

    def descend(descent: Descent, images: Tensor) -> dict[str, Tensor]:
        descent.advance()
        with torch.autocast("cpu", torch.bfloat16):
            return descent.step(images)

    return {
        "energy": lambda images: descend(descents[0], images),
        "fit": lambda images: descend(descents[1], images),
        "game": game,
    }


@pytest.mark.parametrize("terms", [{}, {"objective": "unsupervised", "energy": 1.0}])
def test_a_step_reads_no_value_and_brings_none(terms: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = CtrlCscModel(CtrlCscConfig(image_size=16, latent_dim=8, stage_channels=[8, 8])).train()
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    figures = StepFigures()
    for step in steps_of(model, **terms).values():
        step(images)  # makes the states of the optimisers
        with Dispatches() as dispatches:
            figures.keep(1, step(images))
        assert dispatches.counts["convolution"] > 0
    with pytest.raises(AssertionError, match="_local_scalar_dense waits"), Dispatches():
        images.sum().item()
    with pytest.raises(AssertionError, match="lift_fresh waits"), Dispatches():
        torch.tensor(1.0)


DENSE = {"latent_dim": 256, "sparsity": 0.02, "share_dictionaries": True}


# Half of what commit 9c68f68 launched, counted alike: 860 and 1722 at 32 pixels, 892 and 1583 at 64.
@pytest.mark.parametrize(("size", "iterations", "fit", "game"), [(32, 8, 430, 861), (64, 4, 446, 791)])
def test_a_step_launches_at_most_half_as_many_operations_as_at_9c68f68(
    size: int, iterations: int, fit: int, game: int
) -> None:
    config = CtrlCscConfig(image_size=size, num_iterations=iterations, **DENSE)
    model = CtrlCscModel(config).train().to(memory_format=torch.channels_last)
    images = (torch.rand(2, 3, size, size) * 2 - 1).contiguous(memory_format=torch.channels_last)
    steps, found = steps_of(model), {}
    for name in ("fit", "game"):
        steps[name](images)
        with Dispatches() as dispatches:
            StepFigures().keep(1, steps[name](images))
        found[name] = dispatches.counts.total()
    assert found["fit"] <= fit and found["game"] <= game, found


def test_figures_arrive_a_reading_later_in_order_and_all_of_them_where_asked() -> None:
    figures = StepFigures()
    for step in (1, 2, 3):
        figures.keep(step, {"loss": torch.tensor(float(step)), "psnr": torch.tensor(10.0 * step, dtype=torch.float64)})
    assert figures.read() == []
    figures.keep(4, {"rate": torch.tensor(0.5)})
    assert figures.read() == [(step, {"loss": float(step), "psnr": 10.0 * step}) for step in (1, 2, 3)]
    figures.keep(5, {"rate": torch.tensor(0.25)})
    assert figures.read(everything=True) == [(4, {"rate": 0.5}), (5, {"rate": 0.25})]
    assert figures.read(everything=True) == []


def test_the_first_loss_that_is_not_finite_is_named_with_its_step() -> None:
    figures = StepFigures()
    for step, value in ((1, 1.0), (2, float("inf")), (3, float("nan"))):
        figures.keep(step, {"psnr": torch.tensor(float("inf")), "encoder_loss": torch.tensor(value)})
    with pytest.raises(FloatingPointError, match="step 2: the encoder loss is inf"):
        figures.read(everything=True)


def test_an_average_is_the_sum_of_what_it_saw_with_the_weights_of_its_decay() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    average, expected = AverageOfWeights([parameter], 0.6), None
    for step in range(1, 12):
        seen = torch.full((3,), float(step**2))
        parameter.data.copy_(seen)
        average.advance()
        average.update([parameter])
        decay = 0.0 if step == 1 else min(step / (step + 9), 0.6)
        expected = seen if expected is None else decay * expected + (1 - decay) * seen
        torch.testing.assert_close(average.weights[0], expected)
