"""Configuration of a CTRL-CSC model: the shape of its stages, and what the paper leaves open."""

from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

LARGEST_LAST_SIDE = 8


def default_stages(image_size: int, halvings: int | None = None) -> dict[str, list[int]]:
    """The stages of a model of images of this side: `stage_channels`, `kernel_sizes`, `strides` and `paddings`.

    Stages of 4x4 kernels and stride 2 halve the side, with 64, 128, 256, 512, 512, ... atoms. The kernel of the last
    stage is the side that is left.

    Args:
        image_size: in pixels.
        halvings: number of stages before the last one; by default as many as bring the side to 8 or less, and at least
            two.

    Raises:
        ValueError: for an `image_size` that cannot be halved so often.
    """
    if halvings is None:
        halvings = 2
        while image_size // 2**halvings > LARGEST_LAST_SIDE:
            halvings += 1
    side = image_size // 2**halvings
    _require(
        side >= 1,
        "image_size",
        image_size,
        f"at least {2**halvings} for {halvings} stages of stride 2; give kernel_sizes, strides and paddings for others",
    )
    return {
        "stage_channels": [min(64 * 2**stage, 512) for stage in range(halvings)],
        "kernel_sizes": [4] * halvings + [side],
        "strides": [2] * halvings + [1],
        "paddings": [1] * halvings + [0],
    }


@strict
class _StrictCtrlCscConfig(PreTrainedConfig):
    model_type = "ctrl_csc"

    image_size: int = 32
    num_channels: int = 3
    latent_dim: int = 128
    # Without a value of their own, the stages are those of `default_stages`.
    stage_channels: list[int] | tuple[int, ...] = ()
    kernel_sizes: list[int] | tuple[int, ...] = ()
    strides: list[int] | tuple[int, ...] = ()
    paddings: list[int] | tuple[int, ...] = ()
    low_pass: bool = False
    sparsity: float | int | list[float | int] = 0.02
    ridge: float | int = 0.0
    num_iterations: int | list[int] = 8
    step_size: float | int = 0.9
    denoising_sparsity: list[list[float | int]] | None = None
    share_dictionaries: bool | str = True
    tie_word_embeddings: bool = True


class CtrlCscConfig(_StrictCtrlCscConfig):
    r"""Configuration of `CtrlCscModel`, `CtrlCscEncoder` and `CtrlCscDecoder`.

    Args:
        image_size (`int`): side of the square images, in pixels. The stages must bring it to 1x1. Alone it is enough:
            the stages are then those of `default_stages`.
        num_channels (`int`): channels of the images.
        latent_dim (`int`): d, the length of the unit vector that stands for an image.
        stage_channels (`list[int]`, *optional*): number of atoms of every sparse-coding stage, from pixels inwards.
            One last stage, linear and with `latent_dim` atoms, follows them. They may be given alone, too.
        kernel_sizes, strides, paddings (`list[int]`, *optional*): of every stage, the last one included, so one entry
            more than `stage_channels`.
        low_pass (`bool`): whether the first stage codes what is left of an image without its low pass, the mean under
            each atom. It travels with the codes, as atoms without penalty: the second stage codes both.
        sparsity (`float` or `list[float]`): lambda, the weight of |z|_1: of every sparse-coding stage, or of each. Its
            unit is the standard deviation of the stage's signal.
        ridge (`float`): mu, the weight of |z|^2 / 2.
        num_iterations (`int` or `list[int]`): FISTA steps of every sparse-coding stage, or of each.
        step_size (`float`): of FISTA, times |A|^2; less than 4/3.
        denoising_sparsity (`list[list[float]]`, *optional*): pairs [noise_std, lambda], noise levels rising: the lambda
            that `CtrlCscPipeline.denoise` codes with at each level; its `calibrate_denoising` finds them. They change
            nothing else.
        share_dictionaries (`bool` or `str`): whether encoder and decoder use the same dictionaries; "last", that of the
            last stage alone.

    Raises:
        ValueError: for a wrong value or combination; the message names field, value and what is allowed.

    ```python
    >>> from ctrl_csc_hf import CtrlCscConfig, CtrlCscModel

    >>> model = CtrlCscModel(CtrlCscConfig(image_size=32, latent_dim=128))
    ```
    """

    def __init__(self, **kwargs: Any) -> None:
        try:
            super().__init__(**kwargs)
        except StrictDataclassError as error:  # a wrong type; as a rule it is no ValueError
            raise ValueError(str(error)) from error
        for field in ("stage_channels", "kernel_sizes", "strides", "paddings"):
            if field not in kwargs:
                setattr(self, field, default_stages(self.image_size, len(self.stage_channels) or None)[field])
        self._check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # transformers would only warn, and fill in defaults.
        model_type = config_dict.get("model_type")
        _require(model_type in (None, cls.model_type), "model_type", model_type, f"{cls.model_type!r}")
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config._check()  # with what was given to `from_pretrained`
        return loaded

    @property
    def signal_sizes(self) -> list[int]:
        """Side of every stage's input, from `image_size` on, and 1, the side of the last stage's output."""
        sizes = [self.image_size]
        for kernel_size, stride, padding in zip(self.kernel_sizes, self.strides, self.paddings, strict=True):
            sizes.append((sizes[-1] + 2 * padding - kernel_size) // stride + 1)
        return sizes

    @property
    def stage_shapes(self) -> list[tuple[int, int, int, int, int]]:
        """Of every stage, the last included: signal channels, code channels, kernel size, stride, padding."""
        signals = [self.num_channels, *self.norm_channels]
        codes = [*self.stage_channels, self.latent_dim]
        return list(zip(signals, codes, self.kernel_sizes, self.strides, self.paddings, strict=True))

    @property
    def norm_channels(self) -> list[int]:
        """Channels that each sparse-coding stage hands on: its codes, and the first with them the low pass."""
        first, *others = self.stage_channels
        return [first + self.num_channels * self.low_pass, *others]

    def of_stages(self, field: str) -> list[Any]:
        """`sparsity` or `num_iterations` of every sparse-coding stage."""
        value = getattr(self, field)
        return list(value) if isinstance(value, list | tuple) else [value] * len(self.stage_channels)

    def _check(self) -> None:
        for field in ("image_size", "num_channels", "latent_dim"):
            _require(getattr(self, field) >= 1, field, getattr(self, field), "a positive integer")
        for field, allowed in (("sparsity", "a finite number of at least 0"), ("num_iterations", "a positive integer")):
            value, stages = self.of_stages(field), len(self.stage_channels)
            least = 0 if field == "sparsity" else 1
            fits = len(value) == stages and all(least <= entry < float("inf") for entry in value)
            _require(fits, field, getattr(self, field), f"{allowed}, or a list of {stages}, one a sparse-coding stage")
        _require(0 < self.step_size < 4 / 3, "step_size", self.step_size, "above 0 and below 4/3")
        _require(0 <= self.ridge < float("inf"), "ridge", self.ridge, "a finite number of at least 0")
        if self.denoising_sparsity is not None:
            pairs = self.denoising_sparsity
            finite = [len(pair) == 2 and 0 < pair[0] < float("inf") and 0 <= pair[1] < float("inf") for pair in pairs]
            levels = [pair[0] for pair in pairs if len(pair) > 0]
            _require(
                len(pairs) > 0 and all(finite) and levels == sorted(set(levels)),
                "denoising_sparsity",
                pairs,
                "None or a list of pairs [noise_std > 0, lambda >= 0] of finite numbers, noise_std rising",
            )
        for field in ("stage_channels", "kernel_sizes", "strides"):
            value = getattr(self, field)
            _require(len(value) > 0 and min(value) >= 1, field, value, "a list of positive integers")
        for field in ("kernel_sizes", "strides", "paddings"):
            value, stages = getattr(self, field), len(self.stage_channels) + 1
            _require(len(value) == stages, field, value, f"{stages} entries, one more than stage_channels")
        for kernel_size, padding in zip(self.kernel_sizes, self.paddings, strict=True):
            allowed = f"at least 0 and less than its kernel size (kernel_sizes={list(self.kernel_sizes)})"
            _require(0 <= padding < kernel_size, "paddings", self.paddings, f"entries {allowed}")
        if self.low_pass:
            kernel_size, stride, padding = self.kernel_sizes[0], self.strides[0], self.paddings[0]
            centred = kernel_size == 2 * padding + stride and self.image_size % stride == 0
            allowed = (
                "False for a first stage whose atoms are not centred on their codes: its kernel size must be "
                f"2 padding + stride, and the stride divide image_size={self.image_size}, got kernel size "
                f"{kernel_size}, padding {padding} and stride {stride}"
            )
            _require(centred, "low_pass", self.low_pass, allowed)
        sizes = self.signal_sizes
        _require(
            min(sizes) >= 1 and sizes[-1] == 1,
            "strides",
            self.strides,
            f"strides that, with kernel_sizes={list(self.kernel_sizes)} and paddings={list(self.paddings)}, bring "
            f"image_size={self.image_size} to 1x1 at the last stage; these give sides {sizes}",
        )
        shared = self.share_dictionaries
        _require(shared in (True, False, "last"), "share_dictionaries", shared, "True, False or 'last'")
        # transformers ties tensors only where this flag, made for language models, is set.
        _require(self.tie_word_embeddings, "tie_word_embeddings", self.tie_word_embeddings, "True")


def _require(condition: bool, field: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{field}={value!r} is not allowed: it must be {allowed}")


__all__ = ["CtrlCscConfig", "default_stages"]
