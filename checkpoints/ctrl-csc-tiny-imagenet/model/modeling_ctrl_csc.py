"""CTRL-CSC: an image as a multi-stage sparse deconvolution, and its encoder, multi-stage convolutional sparse coding.

Dai et al., "Closed-Loop Transcription via Convolutional Sparse Coding", CPAL 2024 (arXiv 2302.09347).

    image x -> encoder f -> latents z, unit vectors -> decoder g -> reconstruction xh (-> f -> zh)
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .batch_norm import BatchNorm
from .configuration_ctrl_csc import CtrlCscConfig
from .repository_ctrl_csc import RECORDS, describes_other_model, remove_records
from .sparse_coding import ConvolutionalDictionary, ConvolutionalSparseCoding, normalize_atoms

DETAIL_DEVIATION = 0.2  # of photographs less their low pass, about: stage signals have a deviation of about 1
LOW_PASS_GAIN = 3.0  # of the low pass in the second stage's signal: it holds most of an image's energy
LATENT_OFFSET = 1e-3  # added to a latent's first coordinate before it is scaled to unit length
# Of `from_pretrained`: where a file lies.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


@dataclass
class CtrlCscEncoderOutput(ModelOutput):
    """
    latents: (n, latent_dim), unit vectors.
    pooler_output: the latents again, under the name that transformers' vision models give an image's features.
    hidden_states: the codes of every sparse-coding stage, as `codes`; where asked for.
    codes: of every sparse-coding stage (n, stage_channels[l], h_l, w_l), non-negative; where asked for.
    energy: (n,), the sparse-coding energies of all stages, the last with lambda = 0, summed and divided by the
        image's pixels; where asked for.
    normalized_codes: of every stage what its batch norm hands on (n, norm_channels[l], h_l, w_l), the first stage's
        with the low pass; where asked for.
    """

    latents: Tensor = None  # type: ignore[assignment]  # ModelOutput wants a default
    pooler_output: Tensor = None  # type: ignore[assignment]
    hidden_states: tuple[Tensor, ...] | None = None
    codes: tuple[Tensor, ...] | None = None
    energy: Tensor | None = None
    normalized_codes: tuple[Tensor, ...] | None = None


@dataclass
class CtrlCscDecoderOutput(ModelOutput):
    """
    reconstruction: (n, num_channels, image_size, image_size), pixels in [-1, 1].
    hidden_states: the decoder's codes of every stage (n, stage_channels[l], h_l, w_l), non-negative, in the encoder's
        order, from pixels inwards; where asked for.
    """

    reconstruction: Tensor = None  # type: ignore[assignment]
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class CtrlCscModelOutput(ModelOutput):
    """
    latents: z (n, latent_dim), unit vectors.
    reconstruction: xh (n, num_channels, image_size, image_size), pixels in [-1, 1].
    pooler_output: the latents again, under the name that transformers' vision models give an image's features.
    reconstructed_latents: zh = f(xh), (n, latent_dim); where asked for, at the cost of a second encoding.
    hidden_states: the codes of every sparse-coding stage of the encoder, as `codes`; where asked for.
    codes: of every sparse-coding stage (n, stage_channels[l], h_l, w_l), non-negative; where asked for.
    """

    latents: Tensor = None  # type: ignore[assignment]
    reconstruction: Tensor = None  # type: ignore[assignment]
    pooler_output: Tensor = None  # type: ignore[assignment]
    reconstructed_latents: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    codes: tuple[Tensor, ...] | None = None


class CtrlCscPreTrainedModel(PreTrainedModel):
    config_class = CtrlCscConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # Stages are used through their methods, which offloading hooks do not see, so a half is never split.
    _no_split_modules = ["CtrlCscEncoder", "CtrlCscDecoder"]
    stages: Any  # of each half: ConvolutionalSparseCoding or ConvolutionalDictionary, from pixels inwards
    norms: Any  # BatchNorm of each stage
    last_stage: Any  # ConvolutionalDictionary

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("use_safetensors") is None:  # as diffusers leaves it
            kwargs["use_safetensors"] = True  # pickled weights could run code
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"the weights of {pretrained_model_name_or_path} are damaged, model.safetensors must be whole: {error}"
            ) from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # What this package saves has unit atoms, and stays as it is; weights from elsewhere are made to fit.
        on_device = [d for d in model.dictionaries() if d.dictionary.device.type != "meta"]
        if not all(dictionary.has_unit_atoms() for dictionary in on_device):
            model.project_parameters()
        return loaded

    def save_pretrained(
        self, save_directory: Any, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        folder = Path(save_directory)
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        replaces_another = is_main_process and describes_other_model(folder, self)
        # transformers finds shared weights, such as dictionaries, by their place in memory, but in channels-last order
        # it cannot measure them: it gets copies in the usual order, of weights that are shared one copy.
        state_dict = dict(self.state_dict() if state_dict is None else state_dict)
        copies: dict[int, Tensor] = {}
        for name, tensor in state_dict.items():
            if not tensor.is_contiguous():
                state_dict[name] = copies.setdefault(tensor.data_ptr(), tensor.contiguous())
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        if replaces_another:  # whose card, figures and sampler would be taken for this one's
            remove_records(folder, RECORDS)

    @property
    def signal_unit(self) -> float:
        """Of the first stage's signal and of its lambda, in units of pixels in [-1, 1]."""
        return DETAIL_DEVIATION if self.config.low_pass else 1.0

    def dictionaries(self) -> Iterator[ConvolutionalDictionary]:
        return (module for module in self.modules() if isinstance(module, ConvolutionalDictionary))

    @torch.no_grad()
    def project_parameters(self, *, refine: bool = True) -> None:
        """Back to what the model requires of its parameters: unit atoms, and operator norms that belong to them. Call
        it after each optimiser step and each average of weights.

        Args:
            refine: whether operator norms are found to within 1%, whatever the change. False lets them follow a small
                one by one step of power iteration, which makes no GPU wait; the first steps of training are not small.
        """
        shared = {id(dictionary.dictionary): dictionary.dictionary for dictionary in self.dictionaries()}
        normalize_atoms(list(shared.values()))
        for dictionary in self.dictionaries():
            if isinstance(dictionary, ConvolutionalSparseCoding):
                if refine:
                    dictionary.update_operator_norm(warm=False)
                else:
                    dictionary.follow_operator_norm()

    def share_statistics(self, sum_over_processes: Callable[[Tensor], Tensor] | None) -> None:
        """Makes every batch, in training, a part of one that lies on several processes; None ends it.

        Args:
            sum_over_processes: adds a tensor up over the processes, in place, and returns it.
        """
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.sum_over_processes = sum_over_processes

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ConvolutionalDictionary | BatchNorm):
            module.reset_parameters()
            if isinstance(module, ConvolutionalSparseCoding) and not _is_loaded(module.operator_norm):
                module.update_operator_norm(module.signal_size, warm=False)
        elif isinstance(module, CtrlCscDecoder):
            nn.init.ones_(module.output_scale)
            nn.init.zeros_(module.output_bias)
        else:
            super()._init_weights(module)

    def _wants_hidden_states(self, output_hidden_states: bool | None) -> bool:
        return bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)

    def _check_batch(self, name: str, batch: Tensor) -> None:
        if batch.shape[0] == 0:
            raise ValueError(f"{name} must hold at least one image, got shape {tuple(batch.shape)}")

    def _run_stage(self, stage: Callable[[Tensor, bool], Any], signal: Tensor, update_statistics: bool) -> Any:
        """stage(signal, update_statistics), by gradient checkpointing where that is on."""
        if not (self.gradient_checkpointing and self.training):
            return stage(signal, update_statistics)
        updates = iter([update_statistics])  # the second run, in the backward pass, finds none left
        return self._gradient_checkpointing_func(lambda inputs: stage(inputs, next(updates, False)), signal)


def _is_loaded(tensor: Tensor) -> bool:
    """Whether the tensor came from a checkpoint: transformers also initialises modules that did, and flags these."""
    return getattr(tensor, "_is_hf_initialized", False)


def _encode_stage(
    stage: ConvolutionalSparseCoding,
    norm: BatchNorm,
    statistics: tuple[Tensor, Tensor] | None,
    low: Tensor | None,
    signal: Tensor,
    update_statistics: bool,
) -> tuple[Tensor, Tensor]:
    codes = stage.encode(signal)
    carried = codes if low is None else torch.cat([codes, low.to(codes.dtype)], dim=1)
    return codes, norm(carried, update_statistics, statistics)


def _decode_stage(
    stage: ConvolutionalDictionary, norm: BatchNorm, size: int, signal: Tensor, update_statistics: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    carried = norm(signal, update_statistics)
    width = len(stage.dictionary)
    low = carried[:, width:] if carried.shape[1] > width else None
    codes = F.relu(carried[:, :width])
    return codes, stage.synthesize(codes, (size, size)), low


def _unit_vectors(vectors: Tensor) -> Tensor:
    """v + 1e-3 e_1 scaled to unit length, in float32 or better: (n, d) -> (n, d).

    The offset gives the zero vector a direction and bounds the gradient around it. Rows are divided by their largest
    entry first, so that no square overflows or vanishes.
    """
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    vectors = vectors + F.pad(vectors.new_full((1,), LATENT_OFFSET), (0, vectors.shape[1] - 1))
    largest = vectors.detach().abs().amax(dim=1, keepdim=True)
    scaled = vectors / largest
    return scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True)


class CtrlCscEncoder(CtrlCscPreTrainedModel):
    """f: stages of [sparse coding, batch norm], then a linear stage to one vector, scaled to unit length.

    With `config.low_pass` the first stage codes the image less its low pass, over `signal_unit`; its batch norm
    hands on the low pass as further channels, so that the second stage codes both.

    The last stage is the adjoint alone, and signed: a non-negative one would confine the latents to one orthant. The
    latents of any finite image are unit vectors, see `_unit_vectors`.
    """

    base_model_prefix = "encoder"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    def __init__(self, config: CtrlCscConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        stages = [
            ConvolutionalSparseCoding(
                *shape,
                sparsity=sparsity,
                ridge=config.ridge,
                num_iterations=num_iterations,
                step_size=config.step_size,
            )
            for shape, sparsity, num_iterations in zip(
                config.stage_shapes, config.of_stages("sparsity"), config.of_stages("num_iterations"), strict=False
            )
        ]
        for stage, size in zip(stages, config.signal_sizes, strict=False):
            stage.update_operator_norm((size, size))
        self.stages = nn.ModuleList(stages)
        self.norms = nn.ModuleList(BatchNorm(width) for width in config.norm_channels)
        self.last_stage = ConvolutionalDictionary(*config.stage_shapes[-1])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Gives batch norms the gain of the low pass and the running variances of codes of white noise: no stage falls
        silent in evaluation.

        A FISTA step from zero is about 1 / |A|^2 A*(x), and atoms are unit: codes have a deviation of about
        1 / |A|^2. With a running variance of 1 each stage's signal would be that much smaller than the last, and soon
        below lambda.
        """
        super()._init_weights(module)
        if isinstance(module, BatchNorm):
            stage = self.stages[list(self.norms).index(module)]
            if isinstance(stage, ConvolutionalSparseCoding) and not _is_loaded(module.running_var):
                module.running_var[: stage.code_channels] = stage.operator_norm**-4
            if not _is_loaded(module.weight):
                module.weight[stage.code_channels :] = LOW_PASS_GAIN

    def first_signal(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the first stage codes, of the images' shape, and the low pass (n, C, h, w) that goes with its codes."""
        if not self.config.low_pass:
            return pixel_values, None
        low = self.stages[0].low_pass(pixel_values)
        size = (self.config.image_size, self.config.image_size)
        return (pixel_values - self.stages[0].interpolate(low, size)) / self.signal_unit, low

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_codes: bool = False,
        output_energy: bool = False,
        update_statistics: bool = True,
        reuse_statistics: bool = False,
        output_normalized_codes: bool = False,
        detach_signals: bool = False,
        output_hidden_states: bool | None = None,
    ) -> CtrlCscEncoderOutput:
        """
        Args:
            pixel_values: (n, num_channels, image_size, image_size), in [-1, 1].
            output_codes: whether to return the codes of every sparse-coding stage.
            output_energy: whether to return the stages' sparse-coding energy.
            update_statistics: in training, whether this batch counts in the running statistics of the batch
                norms. Reconstructed images must not.
            reuse_statistics: in training, whether to normalise by the statistics of the batch before, as constants,
                instead of by those of this one: then f is the same map for both.
            output_normalized_codes: whether to return the codes after the batch norms, too.
            detach_signals: whether no gradient passes from a stage to those before it, so that each stage's energy is
                that of its own dictionary.
            output_hidden_states: whether to return the codes as `hidden_states`; by default as the configuration says.
            return_dict: whether to return a `CtrlCscEncoderOutput` rather than a tuple of what it holds; by default as
                the configuration says.

        Raises:
            ValueError: if the images do not have the size and channels of the configuration, and for an empty batch.
        """
        expected = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != expected:
            raise ValueError(
                f"pixel_values must have shape (n, {', '.join(map(str, expected))}), got {tuple(pixel_values.shape)}"
            )
        self._check_batch("pixel_values", pixel_values)
        output_hidden_states = self._wants_hidden_states(output_hidden_states)
        signal, low = self.first_signal(pixel_values.to(self.dtype))
        all_codes: tuple[Tensor, ...] = ()
        all_normalized: tuple[Tensor, ...] = ()
        energy = signal.new_zeros(signal.shape[0]) if output_energy else None
        for stage, norm in zip(self.stages, self.norms, strict=True):
            statistics = norm.batch_statistics if reuse_statistics and self.training else None
            run = partial(_encode_stage, stage, norm, statistics, low)
            codes, next_signal = self._run_stage(run, signal, update_statistics)
            low = None  # it is the image's
            if output_normalized_codes:
                all_normalized += (next_signal,)
            if output_codes or output_hidden_states:
                all_codes += (codes,)
            if output_energy:
                energy = energy + stage.energy(signal, codes)
            signal = next_signal.detach() if detach_signals else next_signal
        vector = self.last_stage.adjoint(signal)
        if output_energy:
            synthesis = self.last_stage.synthesize(vector, signal.shape[-2:])
            energy = energy + (signal - synthesis).square().flatten(1).sum(dim=1) / 2
        latents = _unit_vectors(vector.flatten(1)).to(self.dtype)
        return CtrlCscEncoderOutput(
            latents=latents,
            pooler_output=latents,
            hidden_states=all_codes if output_hidden_states else None,
            codes=all_codes if output_codes else None,
            energy=energy / self.config.image_size**2 if output_energy else None,
            normalized_codes=all_normalized if output_normalized_codes else None,
        )


class CtrlCscDecoder(CtrlCscPreTrainedModel):
    """g, the multi-stage sparse deconvolution: f's stages backwards, as synthesis, normalisation and relu.

    Without relu and normalisation it would be linear; relu, because codes are non-negative. `stages[l]` and
    `norms[l]` belong to the encoder's of the same index.
    """

    base_model_prefix = "decoder"
    main_input_name = "latents"
    _keys_to_ignore_on_load_unexpected = [r"^encoder\."]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config")
        if not isinstance(config, CtrlCscConfig):
            where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            config = CtrlCscConfig.from_pretrained(config or pretrained_model_name_or_path, **where)
        # A whole model's checkpoint holds what its halves share once, under the encoder's name.
        kwargs["key_mapping"] = {rf"^encoder\.({pattern})$": r"\1" for pattern in _shared_tensors(config)}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._weight_conversions = []  # transformers would undo the mapping when this half is saved alone
        return loaded

    def __init__(self, config: CtrlCscConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        self.stages = nn.ModuleList(ConvolutionalDictionary(*shape) for shape in config.stage_shapes[:-1])
        self.norms = nn.ModuleList(BatchNorm(width) for width in config.norm_channels)
        self.last_stage = ConvolutionalDictionary(*config.stage_shapes[-1])
        self.output_scale = nn.Parameter(torch.ones(config.num_channels))
        self.output_bias = nn.Parameter(torch.zeros(config.num_channels))
        self.post_init()

    @can_return_tuple
    def forward(
        self, latents: Tensor, update_statistics: bool = True, output_hidden_states: bool | None = None
    ) -> CtrlCscDecoderOutput:
        """
        Args:
            latents: (n, latent_dim), unit vectors.
            update_statistics: in training, whether this batch counts in the running statistics.
            output_hidden_states: whether to return the codes of every stage; by default as the configuration says.
            return_dict: whether to return a `CtrlCscDecoderOutput` rather than a tuple of what it holds; by default as
                the configuration says.

        Raises:
            ValueError: if the latents do not have `latent_dim` entries, and for an empty batch.
        """
        if latents.ndim != 2 or latents.shape[1] != self.config.latent_dim:
            raise ValueError(f"latents must have shape (n, {self.config.latent_dim}), got {tuple(latents.shape)}")
        self._check_batch("latents", latents)
        *sizes, _ = self.config.signal_sizes
        signal = self.last_stage.synthesize(latents.to(self.dtype)[:, :, None, None], (sizes[-1], sizes[-1]))
        all_codes: tuple[Tensor, ...] = ()
        for stage, norm, size in reversed(list(zip(self.stages, self.norms, sizes, strict=False))):
            run = partial(_decode_stage, stage, norm, size)
            codes, signal, low = self._run_stage(run, signal, update_statistics)
            all_codes = (codes, *all_codes)
        pixels = signal * self.output_scale[:, None, None] + self.output_bias[:, None, None]
        if low is not None:
            pixels = pixels + self.stages[0].interpolate(low, (sizes[0], sizes[0]))
        return CtrlCscDecoderOutput(
            reconstruction=torch.tanh(pixels),
            hidden_states=all_codes if self._wants_hidden_states(output_hidden_states) else None,
        )


class CtrlCscModel(CtrlCscPreTrainedModel):
    """The closed loop x -> z = f(x) -> xh = g(z) (-> zh = f(xh)): encoder and decoder, which may share dictionaries."""

    def __init__(self, config: CtrlCscConfig) -> None:
        super().__init__(config)
        self.encoder = CtrlCscEncoder(config)
        self.decoder = CtrlCscDecoder(config)
        shared = [re.compile(pattern) for pattern in _shared_tensors(config)]
        names = [name for name in self.decoder.state_dict() if any(pattern.fullmatch(name) for pattern in shared)]
        self._tied_weights_keys = {f"decoder.{name}": f"encoder.{name}" for name in names}
        self.post_init()
        # The halves overlook each other's tensors on loading; the whole must not.
        self._keys_to_ignore_on_load_unexpected: set[str] = set()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_reconstructed_latents: bool = False,
        output_codes: bool = False,
        output_hidden_states: bool | None = None,
    ) -> CtrlCscModelOutput:
        """
        Args:
            pixel_values: (n, num_channels, image_size, image_size), in [-1, 1].
            output_reconstructed_latents: whether to encode the reconstruction again.
            output_codes: whether to return the codes of every sparse-coding stage.
            output_hidden_states: whether to return them as `hidden_states`; by default as the configuration says.
            return_dict: whether to return a `CtrlCscModelOutput` rather than a tuple of what it holds; by default as
                the configuration says.

        Raises:
            ValueError: if the images do not have the size and channels of the configuration, and for an empty batch.
        """
        encoded = self.encode(pixel_values, output_codes=output_codes, output_hidden_states=output_hidden_states)
        reconstruction = self.decode(encoded.latents, output_hidden_states=False).reconstruction
        reconstructed_latents = None
        if output_reconstructed_latents:
            options = {"update_statistics": False, "reuse_statistics": True, "output_hidden_states": False}
            again = self.encode(reconstruction, **options)
            reconstructed_latents = again.latents
        return CtrlCscModelOutput(
            latents=encoded.latents,
            reconstruction=reconstruction,
            pooler_output=encoded.latents,
            reconstructed_latents=reconstructed_latents,
            hidden_states=encoded.hidden_states,
            codes=encoded.codes,
        )

    def encode(self, pixel_values: Tensor, **options: Any) -> CtrlCscEncoderOutput:
        """Images (n, num_channels, image_size, image_size) in [-1, 1] -> latents (n, latent_dim).

        Args:
            options: as of `CtrlCscEncoder.forward`; the output is a dataclass whatever `config.return_dict` says.
        """
        return self.encoder(pixel_values, **options, return_dict=True)

    def decode(self, latents: Tensor, **options: Any) -> CtrlCscDecoderOutput:
        """Latents (n, latent_dim) -> reconstruction (n, num_channels, image_size, image_size) in [-1, 1].

        Args:
            options: as of `CtrlCscDecoder.forward`; the output is a dataclass whatever `config.return_dict` says.
        """
        return self.decoder(latents, **options, return_dict=True)


def _shared_tensors(config: CtrlCscConfig) -> list[str]:
    """Patterns of the names of the decoder's tensors that are the encoder's, which alone are saved."""
    patterns: list[str] = []
    if config.share_dictionaries:
        patterns.append(r"last_stage\.dictionary")
    if config.share_dictionaries is True:
        patterns.append(r"stages\.\d+\.dictionary")
    return patterns


__all__ = [
    "CtrlCscDecoder",
    "CtrlCscDecoderOutput",
    "CtrlCscEncoder",
    "CtrlCscEncoderOutput",
    "CtrlCscModel",
    "CtrlCscModelOutput",
    "CtrlCscPreTrainedModel",
]
