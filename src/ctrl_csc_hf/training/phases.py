"""The steps of train.py in bfloat16 autocast, of images on the device, each launched eagerly or as one CUDA graph."""

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor
from transformers import get_scheduler

from ctrl_csc_hf import CtrlCscModel
from ctrl_csc_hf.objectives.closed_loop import PLAYERS, player_parameters

from .ema import AverageOfWeights
from .settings import LOOPS, TrainingSettings
from .steps import Replay, make_adam, set_learning_rate
from .warmup import Descent, deconvolution_error, hold_stages, sparse_coding_energy


class Phases:
    """phases("energy", images), phases("fit", images) and phases("game", images) each make one step of that phase.

    Args:
        model: in training, on its device.
        settings: for an objective that needs no labels.
        steps: number of steps of each phase, which its learning rate follows.
        graphs: phases whose step is one CUDA graph.
    """

    def __init__(
        self, model: CtrlCscModel, settings: TrainingSettings, steps: dict[str, int], graphs: Collection[str] = ()
    ) -> None:
        self.model, self.parameters, self.done = model, list(model.parameters()), 0
        self.keep_dictionaries = settings.keep_dictionaries
        warmups = {
            "energy": (sparse_coding_energy, settings.energy_warmup_learning_rate),
            "fit": (deconvolution_error, settings.deconvolution_warmup_learning_rate),
        }
        self.descents = {name: Descent(loss, model, steps[name], rate) for name, (loss, rate) in warmups.items()}
        self.begin("game")
        self.rates = (settings.encoder_learning_rate, settings.decoder_learning_rate)
        self.players = [
            make_adam(part, rate, (settings.adam_beta1, settings.adam_beta2))
            for part, rate in zip(player_parameters(model), self.rates, strict=True)
        ]
        self.schedule = get_scheduler(
            settings.lr_scheduler, self.players[0], settings.lr_warmup_steps, steps["game"]
        ).lr_lambdas[0]
        self.average = AverageOfWeights(self.parameters, settings.ema_decay)
        self.loop = LOOPS[settings.loop](
            model,
            settings.closed_loop_objective(num_classes=None),
            *self.players,
            players=PLAYERS if settings.encoder_learning_rate else PLAYERS[1:],
        )
        launches = {name: descent.step for name, descent in self.descents.items()} | {"game": self._game}
        self.launches: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
            name: partial(self._in_bfloat16, launch) for name, launch in launches.items()
        }
        self.launches |= {name: Replay(self.launches[name]) for name in graphs}

    def begin(self, name: str) -> None:
        """Before the first step of a phase."""
        hold_stages(self.model, self.keep_dictionaries and name != "energy")

    def __call__(self, name: str, images: Tensor) -> dict[str, Tensor]:
        """One step on images (n, 3, H, W), pixels in [-1, 1]; its figures, which the next step may overwrite."""
        if name in self.descents:
            self.descents[name].advance()
        else:
            for player, rate in zip(self.players, self.rates, strict=True):
                set_learning_rate(player, rate * self.schedule(self.done))
            self.done += 1
            self.average.advance()
        return self.launches[name](images)

    def _in_bfloat16(self, launch: Callable[[Tensor], dict[str, Tensor]], images: Tensor) -> dict[str, Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16):
            return launch(images)

    def _game(self, images: Tensor) -> dict[str, Tensor]:
        played = self.loop.step(images)
        self.average.update(self.parameters)
        return vars(played)
