"""Convolutional sparse coding: one stage of the model, and its linear part alone.

A stage explains a signal `x` as `A(z)`, a transposed convolution of sparse codes `z` with a dictionary of
unit-norm atoms. Encoding solves for the codes by unrolled FISTA, so the layer is the inverse of its own
synthesis. Dai et al., "Revisiting Sparse Convolutional Model for Visual Recognition", NeurIPS 2022
(arXiv 2210.12945); FISTA: Beck and Teboulle, SIAM J. Imaging Sciences 2(1), 2009.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch.autograd.function import once_differentiable

STEP_FACTOR = 0.9  # of 1 / |A|^2, the largest step for which FISTA converges
POWER_ITERATIONS_PER_CHECK = 8
MAX_POWER_ITERATIONS = 512
MAX_PIXEL_CHANNELS = 4
GRADIENTS = ("unrolled", "implicit")
IMPLICIT_DISTANCE = 0.1  # of the codes from the minimiser, relative: up to it the implicit gradient is taken
IMPLICIT_RESIDUAL = 1e-4  # of its linear system, relative
MAX_CONJUGATE_GRADIENTS = 200


class ConvolutionalDictionary(nn.Module):
    """A dictionary `A` of `code_channels` atoms: synthesis `A(z)` and its exact adjoint `A*(x)`.

    Args:
        signal_channels: channels of the signal, C_signal.
        code_channels: number of atoms, C_code.
        kernel_size: side k of an atom, in entries of the signal.
        stride: distance of neighbouring codes, in entries of the signal.
        padding: entries by which atoms may reach over the signal's border, less than `kernel_size`.

    Attributes:
        dictionary: parameter (C_code, C_signal, k, k). Every atom has unit l2 norm; call `normalize_atoms`
            after each optimiser step.

    Raises:
        ValueError: for a size out of range; the message names the argument.
    """

    def __init__(
        self, signal_channels: int, code_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        for name, value in (
            ("signal_channels", signal_channels),
            ("code_channels", code_channels),
            ("kernel_size", kernel_size),
            ("stride", stride),
        ):
            if value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not 0 <= padding < kernel_size:
            raise ValueError(f"padding must be at least 0 and less than kernel_size={kernel_size}, got {padding!r}")
        self.signal_channels = signal_channels
        self.code_channels = code_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.dictionary = nn.Parameter(torch.empty(code_channels, signal_channels, kernel_size, kernel_size))
        self.reset_parameters()

    def extra_repr(self) -> str:
        return (
            f"{self.signal_channels}, {self.code_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}"
        )

    def reset_parameters(self) -> None:
        """Draws atoms uniformly from the unit sphere."""
        nn.init.normal_(self.dictionary)
        self.normalize_atoms()

    @torch.no_grad()
    def normalize_atoms(self) -> None:
        """Projects every atom onto the unit sphere; atoms that are unit up to rounding stay as they are, bit for bit.

        An atom of norm zero, which has no direction, is left at zero.
        """
        norm = self._atom_norms()
        scale = torch.where(self._is_unit(norm) | (norm == 0), 1.0, norm)[:, None, None, None]
        precision = torch.promote_types(self.dictionary.dtype, torch.float32)
        self.dictionary.copy_(self.dictionary.to(precision) / scale.to(precision))

    def has_unit_atoms(self) -> bool:
        """Whether every atom has unit norm up to rounding in the dictionary's precision."""
        return bool(self._is_unit(self._atom_norms()).all())

    def _atom_norms(self) -> Tensor:
        return torch.linalg.vector_norm(self.dictionary.detach(), dim=(1, 2, 3), dtype=torch.float64)

    def _is_unit(self, norm: Tensor) -> Tensor:
        return (norm - 1).abs() <= 8 * torch.finfo(self.dictionary.dtype).eps

    def adjoint(self, signal: Tensor) -> Tensor:
        """A*(x): signal (n, C_signal, H, W) -> (n, C_code, h, w), h = (H + 2 padding - k) // stride + 1."""
        return self._correlate(signal, self.dictionary)

    def synthesize(self, codes: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """A(z): codes (n, C_code, h, w) -> signal (n, C_signal, H, W).

        Args:
            output_size: (H, W) of the signal, which a stride above 1 leaves open; by default the smallest,
                (h - 1) * stride - 2 * padding + k.

        Raises:
            ValueError: if codes of this size do not belong to a signal of `output_size`.
        """
        smallest = [(side - 1) * self.stride - 2 * self.padding + self.kernel_size for side in codes.shape[-2:]]
        surplus = [0, 0] if output_size is None else [H - s for H, s in zip(output_size, smallest, strict=True)]
        if not all(0 <= rest < self.stride for rest in surplus):
            raise ValueError(
                f"output_size must be between {tuple(smallest)} and {tuple(s + self.stride - 1 for s in smallest)} "
                f"for codes of size {tuple(codes.shape[-2:])}, got {output_size}"
            )
        return self._superpose(codes, self.dictionary, surplus)

    # Both maps, with any atoms. Convolutions of pixels, with their few channels, are slow; there, each stride x stride
    # block of pixels becomes the channels of one, and the atoms likewise, which leaves a convolution of stride 1.

    def _correlate(self, signal: Tensor, atoms: Tensor, bias: Tensor | None = None) -> Tensor:
        atoms = atoms.contiguous(memory_format=torch.channels_last)  # the codes' format is theirs, and the faster one
        if not self._in_blocks or signal.shape[0] == 0:  # pixel_unshuffle leaves an empty batch as it is
            return F.conv2d(signal, atoms, bias, self.stride, self.padding)
        blocks = F.pixel_unshuffle(F.pad(signal, self._frame(self._surplus(signal))), self.stride)
        return F.conv2d(blocks, F.pixel_unshuffle(atoms, self.stride), bias)

    def _superpose(self, codes: Tensor, atoms: Tensor, surplus: list[int]) -> Tensor:
        atoms = atoms.contiguous(memory_format=torch.channels_last)
        if not self._in_blocks or codes.shape[0] == 0:
            return F.conv_transpose2d(codes, atoms, None, self.stride, self.padding, surplus)
        blocks = F.conv_transpose2d(codes, F.pixel_unshuffle(atoms, self.stride))
        return F.pad(F.pixel_shuffle(blocks, self.stride), [-width for width in self._frame(surplus)])

    @property
    def _in_blocks(self) -> bool:
        return self.signal_channels <= MAX_PIXEL_CHANNELS and self.stride > 1 and self.kernel_size % self.stride == 0

    def _surplus(self, signal: Tensor) -> list[int]:
        """Rows and columns at the end of a signal that no atom reaches."""
        return [(side + 2 * self.padding - self.kernel_size) % self.stride for side in signal.shape[-2:]]

    def _frame(self, surplus: list[int]) -> list[int]:
        """What the atoms' reach adds to a signal on the left, right, top and bottom; negative where they miss it."""
        return [self.padding, self.padding - surplus[1], self.padding, self.padding - surplus[0]]


class ConvolutionalSparseCoding(ConvolutionalDictionary):
    """A stage: codes z(x) = argmin lambda |z|_1 + mu/2 |z|^2 + 1/2 |x - A(z)|^2 by unrolled FISTA.

    Args:
        signal_channels, code_channels, kernel_size, stride, padding: see `ConvolutionalDictionary`.
        sparsity: lambda, the weight of |z|_1.
        ridge: mu, the weight of |z|^2 / 2.
        num_iterations: steps of FISTA from zero, each of size 0.9 / |A|^2.
        nonnegative: whether codes are restricted to z >= 0.
        gradient: "unrolled" differentiates the steps of FISTA, and keeps them all in memory; "implicit" the
            minimiser that they approach, in memory that does not grow with their number. It needs a ridge and codes
            within 10% of the minimiser, and breaks the graph of torch.compile; call torch.export under torch.no_grad().

    Attributes:
        operator_norm: buffer, the largest singular value of A as an operator on signals of the size in
            `signal_size`. It grows with the signal, so it is kept with the size it belongs to.
        singular_vector: buffer (1, C_signal, H, W), where the power iteration resumes; its shape is that size.

    Raises:
        ValueError: for a value out of range; the message names the argument.
    """

    operator_norm: Tensor
    singular_vector: Tensor

    def __init__(
        self,
        signal_channels: int,
        code_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        sparsity: float = 0.1,
        ridge: float = 0.0,
        num_iterations: int = 2,
        nonnegative: bool = True,
        gradient: str = "unrolled",
    ) -> None:
        _check_problem(sparsity, ridge, num_iterations)
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {GRADIENTS}, got {gradient!r}")
        if gradient == "implicit" and ridge == 0:
            raise ValueError("ridge must be above 0 for gradient='implicit', got 0: the system may be singular")
        super().__init__(signal_channels, code_channels, kernel_size, stride, padding)
        self.sparsity = sparsity
        self.ridge = ridge
        self.num_iterations = num_iterations
        self.nonnegative = nonnegative
        self.gradient = gradient
        self.register_buffer("operator_norm", torch.zeros(()))
        self.register_buffer("singular_vector", torch.zeros(1, signal_channels, 0, 0))
        self.register_load_state_dict_pre_hook(_adopt_saved_signal_size)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, sparsity={self.sparsity}, ridge={self.ridge}, "
            f"num_iterations={self.num_iterations}, nonnegative={self.nonnegative}, gradient={self.gradient!r}"
        )

    def forward(self, signal: Tensor) -> Tensor:
        return self.encode(signal)

    def encode(self, signal: Tensor) -> Tensor:
        """z(x): signal (n, C_signal, H, W) -> codes (n, C_code, h, w), h = (H + 2 padding - k) // stride + 1.

        The gradient of FISTA is taken at the extrapolated point. No gradient flows through the step size.

        Raises:
            RuntimeError: for gradient="implicit", if the codes may be further from the minimiser than it allows; from
                the backward pass, if conjugate gradients do not reach their residual.
        """
        if self.gradient == "implicit" and torch.is_grad_enabled():
            return self._encode_implicitly(signal)
        return self.solve(signal)

    def solve(
        self,
        signal: Tensor,
        *,
        known: Tensor | None = None,
        sparsity: float | None = None,
        num_iterations: int | None = None,
    ) -> Tensor:
        """z(x) as `encode`, for another lambda or number of steps, or from a part of the signal.

        Args:
            signal: (n, C_signal, H, W).
            known: bool, (n or 1, C_signal or 1, H, W): the mask M. The data term is then
                1/2 |M (x - A(z))|^2; what the signal holds elsewhere does not matter. M is its own adjoint, and
                |M A| <= |A|, so the gradient is A*(M (A(z) - x)) and the step size stays valid.
            sparsity, num_iterations: instead of the stage's.

        Returns:
            Codes (n, C_code, h, w), h = (H + 2 padding - k) // stride + 1. Gradients go through the steps of FISTA.

        Raises:
            ValueError: for a value out of range, and for a mask of another dtype or shape.
        """
        sparsity = self.sparsity if sparsity is None else sparsity
        num_iterations = self.num_iterations if num_iterations is None else num_iterations
        _check_problem(sparsity, self.ridge, num_iterations)
        if known is not None:
            allowed = [(1, signal.shape[0]), (1, signal.shape[1]), *([side] for side in signal.shape[2:])]
            fits = known.ndim == 4 and all(side in sides for side, sides in zip(known.shape, allowed, strict=True))
            if known.dtype != torch.bool or not fits:
                raise ValueError(
                    f"known must be bool and of the signal's shape {tuple(signal.shape)}, or 1 in place of the first "
                    f"two, got {known.dtype} of shape {tuple(known.shape)}"
                )
            signal = signal.where(known, 0)
        size = (signal.shape[-2], signal.shape[-1])
        if size != self.signal_size:
            self.update_operator_norm(size)
        step = STEP_FACTOR / self.operator_norm.square()  # a tensor: reading its value would make a GPU wait
        # The proximal map is that of `proximal`, but passes over the codes cost time: step size and shrinkage are part
        # of the atoms here, the threshold of non-negative codes is a bias, and sums happen in place.
        shrinkage = 1 / (1 + step * self.ridge)
        threshold = shrinkage * step * sparsity
        bias = -threshold.expand(self.code_channels) if self.nonnegative else None
        dictionary = self.dictionary.contiguous(memory_format=torch.channels_last)
        ascent, descent = shrinkage * step * dictionary, -dictionary

        codes = self._shrink_(self._correlate(signal, ascent, bias), threshold)
        momentum, previous = 1.0, codes  # t_1 = 1, so the second step has no momentum
        for _ in range(num_iterations - 1):
            next_momentum = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            extrapolated = codes
            if momentum > 1:
                extrapolated = torch.lerp(previous, codes, 1 + (momentum - 1) / next_momentum)
            residual = self._superpose(extrapolated, descent, self._surplus(signal)).add_(signal)
            if known is not None:
                residual = residual * known
            kept = shrinkage * extrapolated if self.ridge else extrapolated
            previous = codes
            codes = self._shrink_(self._correlate(residual, ascent, bias).add_(kept), threshold)
            momentum = next_momentum
        return codes

    def _encode_implicitly(self, signal: Tensor) -> Tensor:
        """Codes z whose gradient is that of a fixed point, z = prox(z + step A*(x - A z)).

        On the support S of z, A_S*(x - A_S z) - mu z - lambda sign(z) = 0. Its differential gives, for a gradient v of
        the codes, u with (A_S* A_S + mu) u = v on S; x and A get the gradient of <u, A*(x - A z)> at fixed z and u.
        """
        with torch.autocast(signal.device.type, enabled=False):
            signal = signal.to(self.dictionary.dtype)
            with torch.no_grad():
                codes = self.solve(signal)
            correlation = self.adjoint(signal - self._superpose(codes, self.dictionary, self._surplus(signal)))
            with torch.no_grad():
                step = STEP_FACTOR / self.operator_norm.square()
                moved = torch.linalg.vector_norm(self.proximal(codes + step * correlation, step) - codes)
                # A step contracts distances by 1 / (1 + step mu) or more.
                distance = moved * (1 + 1 / (step * self.ridge)) / torch.linalg.vector_norm(codes).clamp(min=1e-12)
            if not distance <= IMPLICIT_DISTANCE:
                raise RuntimeError(
                    f"codes may be {distance.item():.2g} of their norm away from the minimiser, the implicit gradient "
                    f"allows {IMPLICIT_DISTANCE}: raise num_iterations={self.num_iterations} or ridge={self.ridge}"
                )
            return _ImplicitGradient.apply(correlation, codes, self.dictionary.detach(), self)

    def _shrink_(self, codes: Tensor, threshold: Tensor) -> Tensor:
        return F.relu_(codes) if self.nonnegative else codes - codes.clamp(-threshold, threshold)

    def proximal(self, codes: Tensor, step: Tensor) -> Tensor:
        """argmin over z (z >= 0 where `nonnegative`) of step (lambda |z|_1 + mu/2 |z|^2) + 1/2 |z - codes|^2."""
        threshold = step * self.sparsity
        shrunk = F.relu(codes - threshold)
        if not self.nonnegative:
            shrunk = shrunk - F.relu(-codes - threshold)
        return shrunk / (1 + step * self.ridge) if self.ridge else shrunk

    def energy(self, signal: Tensor, codes: Tensor) -> Tensor:
        """lambda |z|_1 + mu/2 |z|^2 + 1/2 |x - A(z)|^2, summed over each image: (n,), in squared signal units."""
        residual = signal - self.synthesize(codes, (signal.shape[-2], signal.shape[-1]))
        prior = self.sparsity * codes.abs() + self.ridge / 2 * codes.square()
        return prior.flatten(1).sum(dim=1) + residual.square().flatten(1).sum(dim=1) / 2

    @property
    def signal_size(self) -> tuple[int, int]:
        """(H, W) of the signals that `operator_norm` belongs to; (0, 0) before the first signal."""
        return self.singular_vector.shape[-2], self.singular_vector.shape[-1]

    @torch.no_grad()
    def update_operator_norm(self, signal_size: tuple[int, int] | None = None, *, warm: bool = True) -> None:
        """Refreshes `operator_norm` by power iteration on A A*. Call it after each change of the dictionary.

        `encode` calls it whenever the signal's size changes.

        Args:
            signal_size: (H, W) of the signals to be encoded; by default the size last encoded.
            warm: whether to start where the last iteration ended, if that was for the same size.

        Raises:
            ValueError: if no signal was encoded yet and no size is given.
        """
        size = self.signal_size if signal_size is None else signal_size
        if 0 in size:
            raise ValueError(f"signal_size must be positive, got {size}: give a size, or encode a signal first")
        # The step size decides whether FISTA converges: float32 or better, whatever the dictionary has.
        dictionary = self.dictionary.to(torch.promote_types(self.dictionary.dtype, torch.float32))
        vector = self.singular_vector if warm and size == self.signal_size else self._chirp(size)
        norm, vector = _power_iteration(dictionary, vector.to(dictionary.dtype), self.stride, self.padding)
        self.operator_norm = norm.to(self.operator_norm.dtype)
        self.singular_vector = vector.to(self.singular_vector.dtype)

    def _chirp(self, size: tuple[int, int]) -> Tensor:
        """A start for the power iteration: holds every frequency, and leaves the random generator alone."""
        index = torch.arange(self.signal_channels * size[0] * size[1], device=self.dictionary.device)
        return torch.cos(0.7 * (index % 1021).square()).view(1, self.signal_channels, *size)


def _check_problem(sparsity: float, ridge: float, num_iterations: int) -> None:
    for name, value in (("sparsity", sparsity), ("ridge", ridge)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations!r}")


class _ImplicitGradient(torch.autograd.Function):
    """The codes, as a function of A*(x - A z); see `ConvolutionalSparseCoding._encode_implicitly`."""

    @staticmethod
    def forward(
        ctx: Any, correlation: Tensor, codes: Tensor, dictionary: Tensor, stage: ConvolutionalSparseCoding
    ) -> Tensor:
        ctx.save_for_backward(codes, dictionary)
        ctx.stage, ctx.size = stage, stage.signal_size
        return codes.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, dictionary = ctx.saved_tensors
        support = codes != 0
        surplus = ctx.stage._surplus(codes.new_empty(0, 0, *ctx.size))

        def operator(u: Tensor) -> Tensor:
            synthesis = ctx.stage._superpose(u, dictionary, surplus)
            return ctx.stage._correlate(synthesis, dictionary) * support + ctx.stage.ridge * u

        return _conjugate_gradients(operator, gradients[0] * support), None, None, None


def _conjugate_gradients(operator: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """u with operator(u) = target up to `IMPLICIT_RESIDUAL` of its norm, for a positive definite operator."""
    solution, residual = torch.zeros_like(target), target.clone()
    direction, squared = residual.clone(), residual.square().sum()
    goal = IMPLICIT_RESIDUAL**2 * squared
    for _ in range(MAX_CONJUGATE_GRADIENTS):
        if squared <= goal:
            return solution
        applied = operator(direction)
        length = squared / (direction * applied).sum()
        solution += length * direction
        residual -= length * applied
        previous, squared = squared, residual.square().sum()
        direction = residual + squared / previous * direction
    raise RuntimeError(
        f"the implicit gradient's residual is {(squared / goal).sqrt() * IMPLICIT_RESIDUAL:.1e} after "
        f"{MAX_CONJUGATE_GRADIENTS} conjugate gradients, {IMPLICIT_RESIDUAL} is needed: raise the ridge"
    )


# An operator of its own, so that torch.compile neither unrolls the iteration nor stumbles over its stopping rule.
# A copy of this file may come from the Hub beside the installed package, so the operator's name holds a hash of the
# module's name, which itself need not be an identifier.
@library.custom_op(f"ctrl_csc_{hashlib.sha256(__name__.encode()).hexdigest()}::power_iteration", mutates_args=())
def _power_iteration(dictionary: Tensor, vector: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """Largest singular value of A, to within 1%, and A A* times its singular vector (1, C_signal, H, W)."""
    surplus = [(side + 2 * padding - dictionary.shape[-1]) % stride for side in vector.shape[-2:]]
    norm = dictionary.new_zeros(())
    with torch.autocast(dictionary.device.type, enabled=False):
        for _ in range(MAX_POWER_ITERATIONS // POWER_ITERATIONS_PER_CHECK):
            previous = norm
            for _ in range(POWER_ITERATIONS_PER_CHECK):
                codes = F.conv2d(vector / torch.linalg.vector_norm(vector), dictionary, None, stride, padding)
                vector = F.conv_transpose2d(codes, dictionary, None, stride, padding, surplus)
            norm = torch.linalg.vector_norm(codes)
            if norm - previous <= 1.5e-4 * norm:
                break
    return norm, vector


@_power_iteration.register_fake
def _(dictionary: Tensor, vector: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    return dictionary.new_empty(()), torch.empty_like(vector)


def _adopt_saved_signal_size(
    stage: ConvolutionalSparseCoding, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """Makes room for the saved singular vector, whose shape depends on the signals seen before saving."""
    saved = state_dict.get(f"{prefix}singular_vector")
    if saved is not None and saved.shape != stage.singular_vector.shape:
        stage.singular_vector = stage.singular_vector.new_zeros(saved.shape)
