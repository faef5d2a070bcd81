"""The three phases of a training: dictionaries from the sparse-coding energy, a fit of both nets, the game."""

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor
from transformers import get_scheduler

from ctrl_csc_hf import CtrlCscModel
from ctrl_csc_hf.objectives.closed_loop import PLAYERS, ClosedLoop, player_parameters

from .ema import AverageOfWeights, recompute_statistics
from .settings import TrainingSettings
from .steps import Replay, make_adam, set_learning_rate
from .warmup import (
    Descent,
    deconvolution_error,
    hold_stages,
    invert_encoder,
    principal_directions,
    sparse_coding_energy,
)


class Phases:
    """phases("energy", images), phases("fit", images) and phases("game", images) each make one step of that phase.

    Args:
        model: in training, on its device.
        settings: of the run.
        num_classes: of the labels, where the objective needs them.
        graphs: phases whose step is one CUDA graph.

    Attributes:
        steps: number of steps of each phase, in their order, which its learning rate follows. A run that starts from a
            trained model begins with the game.
        descents: of the energy and the fit.
        players: the optimisers of the game, by player.
        game_steps: number of steps of the game made.
        average: of the weights, or None.
    """

    def __init__(
        self,
        model: CtrlCscModel,
        settings: TrainingSettings,
        num_classes: int | None = None,
        graphs: Collection[str] = (),
        steps: dict[str, int] | None = None,
    ) -> None:
        self.model, self.settings, self.game_steps = model, settings, 0
        self.steps = steps_of_phases(settings) if steps is None else steps
        self.parameters = list(model.parameters())
        warmups = {
            "energy": (sparse_coding_energy, settings.energy_warmup_learning_rate),
            "fit": (deconvolution_error, settings.deconvolution_warmup_learning_rate),
        }
        self.descents = {name: Descent(loss, model, self.steps[name], rate) for name, (loss, rate) in warmups.items()}
        self.begin("game")
        self._rates = dict(zip(PLAYERS, (settings.encoder_learning_rate, settings.decoder_learning_rate), strict=True))
        self.players = {
            player: make_adam(parameters, self._rates[player], (settings.adam_beta1, settings.adam_beta2))
            for player, parameters in zip(PLAYERS, player_parameters(model), strict=True)
        }
        self._schedule = get_scheduler(
            settings.lr_scheduler, self.players["decoder"], settings.lr_warmup_steps, self.steps["game"]
        ).lr_lambdas[0]
        self.average = AverageOfWeights(self.parameters, settings.ema_decay) if settings.use_ema else None
        self._loop = ClosedLoop(
            model,
            settings.closed_loop_objective(num_classes),
            *self.players.values(),
            players=PLAYERS if settings.encoder_learning_rate else PLAYERS[1:],
        )
        steps_by_name = {name: descent.step for name, descent in self.descents.items()} | {"game": self._game}
        self._launches: dict[str, Callable[..., dict[str, Tensor]]] = {
            name: partial(self._in_precision, step) for name, step in steps_by_name.items()
        }
        self._launches |= {name: Replay(self._launches[name]) for name in graphs}

    def begin(self, name: str) -> None:
        """Before the first step of a phase."""
        hold_stages(self.model, self.settings.keep_dictionaries and name != "energy")

    def __call__(self, name: str, images: Tensor, *labels: Tensor) -> dict[str, Tensor]:
        """One step on images (n, 3, H, W), pixels in [-1, 1], of which the game may have labels (n,).

        Returns:
            The step's figures, which the next step may overwrite.
        """
        if name in self.descents:
            self.descents[name].advance()
        else:
            for player, rate in self._rates.items():
                set_learning_rate(self.players[player], rate * self._schedule(self.game_steps))
            self.game_steps += 1
            if self.average:
                self.average.advance()
        return self._launches[name](images, *labels)

    def _in_precision(
        self, step: Callable[..., dict[str, Tensor]], images: Tensor, *labels: Tensor
    ) -> dict[str, Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.settings.mixed_precision == "bf16"):
            return step(images, *labels)

    def end(self, name: str, images: Tensor, batch_size: int) -> None:
        """After the last step of the energy or the fit: what the next phase begins with.

        Args:
            images: training images (n, 3, H, W), pixels in [-1, 1], by which statistics and closed forms are found.
            batch_size: images a batch of those.
        """
        self._launches.pop(name)  # a graph holds memory
        self.descents[name].optimizer.state.clear()  # of no use to later checkpoints
        self.begin("game")
        recompute_statistics(self.model, images, batch_size)
        if name == "energy":
            on_device = images.to(self.model.device)
            principal_directions(self.model, on_device, batch_size)
            invert_encoder(self.model, on_device)
        elif self.average:
            self.average.advance()
            self.average.update(self.parameters)

    def _game(self, images: Tensor, *labels: Tensor) -> dict[str, Tensor]:
        played = self._loop.step(images, *labels)
        if self.average:
            self.average.update(self.parameters)
        return vars(played)


def steps_of_phases(settings: TrainingSettings) -> dict[str, int]:
    before = not settings.pretrained_model_name_or_path  # whose model knows what they teach
    return {
        "energy": settings.energy_warmup_steps if before else 0,
        "fit": settings.deconvolution_warmup_steps if before else 0,
        "game": settings.max_train_steps,
    }
