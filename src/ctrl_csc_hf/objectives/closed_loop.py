"""One step of the game between encoder and decoder: closed-loop transcription (CTRL).

    x -> z = f(x) -> xh = g(z) -> zh = f(xh)

    encoder: minimise L_f = -J + w_E E(x)
    decoder: minimise L_g = +J + w_g S(z, zh) + w_c S_c + w_x 1/2 |x - xh|^2

J is the utility: that of the latents (an objective of rate_reduction.py) and, a stage l, w_l dR(C_l, Ch_l), the rate
reduction between the codes of x and of xh. The latents hold nothing of what they throw away; the codes do. S is
self-consistency, the mean of 1 - cos(z_i, zh_i), and S_c that of the codes; E the sparse-coding energy; |x - xh|^2 a
mean over pixels. Dai et al., Entropy 24(4):456, 2022; Tong et al., "Unsupervised Learning of Structured
Representations via Closed-Loop Transcription", CPAL 2024; the terms of the codes are this package's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..models.modeling_ctrl_csc import CtrlCscModel
from .distributed import (
    count_over_processes,
    gather_for_all,
    num_processes,
    sum_for_all,
    sum_gradients,
    sum_over_processes,
)
from .rate_reduction import (
    check_precision,
    class_moments,
    cosine_distance,
    multiclass_objective_of_moments,
    multiclass_objective_of_pair,
    rates_of_moments,
    rates_of_pair,
    second_moments,
)

OBJECTIVES = ("binary", "multi", "unsupervised")
PLAYERS = ("encoder", "decoder")


@dataclass(frozen=True)
class ClosedLoopObjective:
    """What the two players minimise.

    Args:
        objective: J. "binary": dR(Z, Zh); "multi": CTRL-Multi, with labels; "unsupervised": R(Z) + dR(Z, Zh).
        distortion: eps^2 of the coding rates.
        num_classes: of the labels; "multi" needs it.
        decoder_consistency: w_g, weight of S in the decoder's loss.
        energy: w_E, weight of the sparse-coding energy per pixel.
        code_reduction: w_l of every stage, from pixels inwards; one number stands for all stages.
        code_consistency: w_c, weight of S_c, the mean of (C_l - Ch_l)^2 summed over stages, in the decoder's loss.
        pixel_error: w_x, weight of the squared error of pixels, in the decoder's loss.

    Raises:
        ValueError: for a value that is not allowed; the message names it.
    """

    objective: str = "binary"
    distortion: float = 0.5
    num_classes: int | None = None
    decoder_consistency: float = 0.0
    energy: float = 0.0
    code_reduction: float | Sequence[float] = 0.0
    code_consistency: float = 0.0
    pixel_error: float = 0.0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {OBJECTIVES}, got {self.objective!r}")
        for name in ("decoder_consistency", "energy", "code_reduction", "code_consistency", "pixel_error"):
            value = getattr(self, name)
            weights = value if isinstance(value, Sequence) else [value]
            if not weights or not all(0 <= weight < float("inf") for weight in weights):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
        if not self.distortion > 0:
            raise ValueError(f"distortion must be positive, got {self.distortion!r}")
        if self.objective == "multi" and not (self.num_classes and self.num_classes > 0):
            raise ValueError(f"num_classes must be a positive integer for objective='multi', got {self.num_classes!r}")

    def utility(
        self, latents: Tensor, reconstructed: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """J(Z, Zh), and dR(Z, Zh), R(Z) and R(Zh) detached: scalars, in nats.

        Over several processes, of the images of all. They exchange second moments, d^2 numbers a class, or the
        features, d numbers an image, where "multi" has fewer of these.

        Args:
            latents, reconstructed: z and zh (n, d).
            labels: (n,), for "multi"; on the CPU they make no GPU wait.
        """
        if self.objective == "multi":
            if labels is None or self.num_classes is None:
                raise ValueError("labels must be given for objective='multi', got None")
            utility, rates = self._multiclass(latents, reconstructed, labels, self.num_classes)
        else:
            if num_processes() == 1:
                rates = rates_of_pair(latents, reconstructed, distortion=self.distortion)
            else:
                moments = sum_for_all(second_moments(torch.stack([latents, reconstructed])))
                count = count_over_processes(len(latents), latents.device)
                rates = rates_of_moments(moments, count, distortion=self.distortion)
            reduction, rate, _ = rates
            utility = reduction if self.objective == "binary" else rate + reduction
        reduction, rate, reconstructed_rate = (value.detach() for value in rates)
        return utility, (reduction, rate, reconstructed_rate)

    def _multiclass(
        self, latents: Tensor, reconstructed: Tensor, labels: Tensor, classes: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        options = {"distortion": self.distortion}
        if num_processes() > 1:
            on_device = labels.to(latents.device, torch.int64)
            counts = sum_over_processes(torch.bincount(on_device, minlength=classes))
            if classes * latents.shape[1] <= counts.sum():
                sets = [class_moments(features, labels, classes) for features in (latents, reconstructed)]
                moments = sum_for_all(torch.stack(sets))
                rates = rates_of_moments(moments.sum(dim=1), counts.sum(), **options)
                return multiclass_objective_of_moments(moments, counts, **options), rates
            latents, reconstructed, labels = (gather_for_all(rows) for rows in (latents, reconstructed, on_device))
        rates = rates_of_pair(latents, reconstructed, **options)
        return multiclass_objective_of_pair(latents, reconstructed, labels, classes, **options), rates

    @property
    def compares_codes(self) -> bool:
        """Whether a term of the stages' codes has a weight."""
        weights = self.code_reduction
        return bool(self.code_consistency or (any(weights) if isinstance(weights, Sequence) else weights))

    def stage_weights(self, stages: int) -> list[float]:
        """w_l of every stage; ValueError for another number of weights."""
        weights = self.code_reduction
        if not isinstance(weights, Sequence):
            return [weights] * stages
        if len(weights) != stages:
            raise ValueError(f"code_reduction must be one number or {stages}, one a stage, got {weights!r}")
        return list(weights)

    def code_reductions(self, codes: Sequence[Tensor], reconstructed: Sequence[Tensor]) -> list[Tensor]:
        """dR(C_l, Ch_l) of every stage, scalars, in nats; over several processes, of the images of all.

        R(C) = 1/2 logdet(I + 1/(N eps^2) C^T C) of the N rows of a stage, the codes at every position of every image:
        normalised, they have the length sqrt(C_l), which takes the place of the factor d of unit rows.

        Args:
            codes, reconstructed: the normalised codes of x and of xh, each (n, C_l, h_l, w_l).
        """
        reductions = []
        for pair in zip(codes, reconstructed, strict=True):
            width, positions = pair[0].shape[1], pair[0][0, 0].numel()
            moments = sum_for_all(second_moments(torch.stack([c.movedim(1, -1).flatten(0, -2) for c in pair])))
            count = positions * count_over_processes(len(pair[0]), moments.device)
            reductions.append(rates_of_moments(moments, count, distortion=self.distortion * width)[0])
        return reductions

    def code_difference(self, codes: Sequence[Tensor], reconstructed: Sequence[Tensor]) -> Tensor:
        """S_c of each image (n,): the means of (C_l - Ch_l)^2, summed over stages; of the codes of x as constants."""
        differences = [c.detach().to(_precise(c)) - again for c, again in zip(codes, reconstructed, strict=True)]
        return torch.stack([difference.square().flatten(1).mean(dim=1) for difference in differences]).sum(dim=0)


@dataclass
class ClosedLoopFigures:
    """Of one step, detached scalars: dR(Z, Zh), R(Z), R(Zh) and the stages' dR(C_l, Ch_l) in all, in nats; S and S_c;
    PSNR of the batch in dB; both losses. The codes' are 0 where nothing weighs them.
    """

    rate_reduction: Tensor
    rate: Tensor
    reconstructed_rate: Tensor
    code_reduction: Tensor
    consistency: Tensor
    code_consistency: Tensor
    psnr: Tensor
    encoder_loss: Tensor
    decoder_loss: Tensor


class ClosedLoop:
    """Plays the game, one step a call.

    One pass of the loop gives both players' gradients, equal to those of two passes at the same parameters. The
    encoder's batch norms normalise reconstructions by the statistics of the batch of images, as constants, so that f is
    one map.

    Where torch.distributed is in use, each process gives its part of the batch, of any size above 0, and all of them
    end with the weights of one process with the whole batch. The model is not to be wrapped. A step reads no value of
    the device, so no GPU waits: whether the losses in its figures are finite is for the caller to see, before it saves
    anything. Where the model's halves are
    compiled and S has a weight, a step goes back through a graph twice, for which torch wants
    `torch._functorch.config.donated_buffer = False` before they are.

    Args:
        model: the two players.
        objective: what they minimise.
        encoder_optimizer: of the encoder's parameters, and of all that the players share.
        decoder_optimizer: of the decoder's other parameters.
        players: who plays, one or both; the other stands still.

    Raises:
        ValueError: for weights of another number of stages, and for a distortion that is too small for the coding rates
            of unit vectors to be exact.
    """

    def __init__(
        self,
        model: CtrlCscModel,
        objective: ClosedLoopObjective,
        encoder_optimizer: Optimizer,
        decoder_optimizer: Optimizer,
        *,
        players: Sequence[str] = PLAYERS,
    ) -> None:
        objective.stage_weights(len(model.config.stage_channels))
        device = "mps" if model.device.type == "mps" else "cpu"  # as precise as where the rates are computed
        check_precision("latents", torch.eye(1, model.config.latent_dim, device=device), objective.distortion)
        self.model = model
        self.objective = objective
        self.optimizers = (encoder_optimizer, decoder_optimizer)
        self.players = players
        model.share_statistics(sum_over_processes if num_processes() > 1 else None)

    def step(self, pixel_values: Tensor, labels: Tensor | None = None) -> ClosedLoopFigures:
        """One step of both players.

        Args:
            pixel_values: x (n, C, H, W), in [-1, 1].
            labels: y (n,), for objective "multi", best on the CPU, see `ClosedLoopObjective.utility`.
        """
        figures = self.backward(pixel_values, labels)
        self._apply_gradients()
        return figures

    def backward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ClosedLoopFigures:
        """Adds dL_f/dtheta and dL_g/deta to the players' gradients, from one pass of the loop.

        The decoder's input is z.detach() and the second encoding's a copy of xh, so each player's gradient is
        its own. The decoder's is dL_g/dxh, pushed through g; dL_g/dxh = -dL_f/dxh where S has no weight, and
        otherwise takes a second backward pass through f, by its input alone.
        """
        objective, model = self.objective, self.model
        encoder_plays, decoder_plays = "encoder" in self.players, "decoder" in self.players
        with torch.set_grad_enabled(encoder_plays):
            with_energy = encoder_plays and objective.energy > 0
            options = {"output_normalized_codes": objective.compares_codes}
            encoded = model.encode(pixel_values, output_energy=with_energy, update_statistics=encoder_plays, **options)
        z = encoded.latents
        with torch.set_grad_enabled(decoder_plays):
            xh = model.decode(z.detach(), update_statistics=decoder_plays).reconstruction
        second_input = xh.detach().requires_grad_(decoder_plays)
        encoded_again = model.encode(second_input, update_statistics=False, reuse_statistics=True, **options)
        zh = encoded_again.latents

        count = count_over_processes(len(z), z.device)
        utility, rates = objective.utility(z, zh, labels)
        consistency = cosine_distance(z, zh).sum() / count
        code_reduction = code_consistency = consistency.new_zeros(())
        if encoded.normalized_codes is not None and encoded_again.normalized_codes is not None:
            pairs = (encoded.normalized_codes, encoded_again.normalized_codes)
            of_stages = objective.code_reductions(*pairs)
            code_reduction = torch.stack(of_stages).sum()
            weights = objective.stage_weights(len(of_stages))
            utility = utility + sum(weight * reduction for weight, reduction in zip(weights, of_stages, strict=True))
            code_consistency = objective.code_difference(*pairs).sum() / count
        encoder_loss, decoder_loss = -utility, utility
        if objective.decoder_consistency:
            decoder_loss = decoder_loss + objective.decoder_consistency * consistency
        if objective.code_consistency:
            decoder_loss = decoder_loss + objective.code_consistency * code_consistency
        if objective.pixel_error:
            error = (pixel_values - second_input).square().flatten(1).mean(dim=1).sum() / (2 * count)
            decoder_loss = decoder_loss + objective.pixel_error * error
        if encoded.energy is not None:
            encoder_loss = encoder_loss + objective.energy * encoded.energy.sum() / count
        figures = self._figures(
            pixel_values, xh, utility, rates, code_reduction, (consistency, code_consistency),
            encoder_loss, decoder_loss, count,
        )  # fmt: skip

        pure_game = not (objective.decoder_consistency or objective.code_consistency or objective.pixel_error)
        if encoder_plays and decoder_plays and pure_game:
            encoder_loss.backward()
            xh.backward(-second_input.grad)  # type: ignore[operator]  # it has one
        else:
            if decoder_plays:
                (xh_gradient,) = torch.autograd.grad(decoder_loss, second_input, retain_graph=encoder_plays)
            if encoder_plays:
                encoder_loss.backward(inputs=[p for p in model.encoder.parameters() if p.requires_grad])
            if decoder_plays:
                xh.backward(xh_gradient)
        return figures

    def _apply_gradients(self) -> None:
        sum_gradients([p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]])
        for optimizer in self.optimizers:  # a parameter without gradient stays, its moments too
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.model.project_parameters(refine=False)
        torch.clear_autocast_cache()  # which holds the weights of before, for as long as its context lasts

    @torch.no_grad()
    def _figures(
        self,
        x: Tensor,
        xh: Tensor,
        utility: Tensor,
        rates: tuple[Tensor, Tensor, Tensor],
        code_reduction: Tensor,
        consistencies: tuple[Tensor, Tensor],
        encoder_loss: Tensor,
        decoder_loss: Tensor,
        count: Tensor | int,
    ) -> ClosedLoopFigures:
        error = x - xh
        squared_error = error.to(_precise(error)).square().flatten(1).mean(dim=1)
        psnr = (10 * torch.log10(4 / squared_error)).sum() / count
        if num_processes() > 1:
            # Of the losses, the utility is every process's whole, the rest this process's part.
            parts = torch.stack([*consistencies, psnr, encoder_loss + utility, decoder_loss - utility])
            *means, psnr, encoder_rest, decoder_rest = sum_over_processes(parts)
            consistencies = (means[0], means[1])
            encoder_loss, decoder_loss = encoder_rest - utility, decoder_rest + utility
        values = (code_reduction, *consistencies, psnr, encoder_loss, decoder_loss)
        return ClosedLoopFigures(*rates, *(value.detach() for value in values))


def _precise(tensor: Tensor) -> torch.dtype:
    """Float32, or better where the tensor is."""
    return torch.promote_types(tensor.dtype, torch.float32)


def player_parameters(model: CtrlCscModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of the encoder's optimiser and of the decoder's: what they share belongs to the encoder's."""
    encoder = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    shared = {id(parameter) for parameter in encoder}
    return encoder, [p for p in model.decoder.parameters() if p.requires_grad and id(p) not in shared]
