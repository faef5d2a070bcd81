"""Convolutional sparse coding: one stage of the model, and its linear part alone.

A stage explains a signal `x` as `A(z)`, a transposed convolution of sparse codes `z` with a dictionary of
unit-norm atoms. Encoding solves for the codes by unrolled FISTA, so the layer is the inverse of its own
synthesis. Dai et al., "Revisiting Sparse Convolutional Model for Visual Recognition", NeurIPS 2022
(arXiv 2210.12945); FISTA: Beck and Teboulle, SIAM J. Imaging Sciences 2(1), 2009.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_weight

LARGEST_STEP_SIZE = 4 / 3  # of 1 / |A|^2: beyond it FISTA's extrapolation amplifies what it should damp
POWER_ITERATIONS_PER_CHECK = 8
MAX_POWER_ITERATIONS = 512
MAX_PIXEL_CHANNELS = 4


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

    def normalize_atoms(self) -> None:
        """Projects every atom onto the unit sphere, see `normalize_atoms`."""
        normalize_atoms([self.dictionary])

    def has_unit_atoms(self) -> bool:
        """Whether every atom has unit norm up to rounding in the dictionary's precision."""
        return bool(_is_unit(_atom_norms(self.dictionary), self.dictionary.dtype).all())

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

    # The low pass of a signal, at the codes' positions. Atoms are centred on theirs where k = 2 padding + stride.

    def low_pass(self, signal: Tensor) -> Tensor:
        """The mean of the signal under each atom, its border left out: (n, C_signal, H, W) -> (n, C_signal, h, w)."""
        return F.avg_pool2d(signal, self.kernel_size, self.stride, self.padding, count_include_pad=False)

    def interpolate(self, low: Tensor, output_size: tuple[int, int]) -> Tensor:
        """A low pass, bilinearly between the codes' positions: (n, C, h, w) -> (n, C, H, W)."""
        return F.interpolate(low, output_size, mode="bilinear")

    # Both maps, with any atoms, as plain convolutions. Those of pixels, with their few channels, are slow; there, each
    # stride x stride block of pixels becomes the channels of one, and the atoms likewise: a convolution of stride 1.

    def _correlate(self, signal: Tensor, atoms: Tensor) -> Tensor:
        if self._in_blocks and signal.shape[0] > 0:  # pixel_unshuffle leaves an empty batch as it is
            return F.conv2d(self._blocks(signal), F.pixel_unshuffle(atoms, self.stride))
        return F.conv2d(signal, atoms, None, self.stride, self.padding)

    def _superpose(self, codes: Tensor, atoms: Tensor, surplus: list[int]) -> Tensor:
        if self._in_blocks and codes.shape[0] > 0:
            blocks = F.conv_transpose2d(codes, F.pixel_unshuffle(atoms, self.stride))
            return F.pad(F.pixel_shuffle(blocks, self.stride), [-width for width in self._frame(surplus)])
        return F.conv_transpose2d(codes, atoms, None, self.stride, self.padding, surplus)

    def _blocks(self, signal: Tensor) -> Tensor:
        return F.pixel_unshuffle(F.pad(signal, self._frame(self._surplus(signal))), self.stride)

    @property
    def _in_blocks(self) -> bool:
        return self.signal_channels <= MAX_PIXEL_CHANNELS and self.stride > 1 and self.kernel_size % self.stride == 0

    def _surplus(self, signal: Tensor) -> list[int]:
        """Rows and columns at the end of a signal that no atom reaches."""
        return [(side + 2 * self.padding - self.kernel_size) % self.stride for side in signal.shape[-2:]]

    def _frame(self, surplus: list[int]) -> list[int]:
        """What the atoms' reach adds to a signal on the left, right, top and bottom; negative where they miss it."""
        return [self.padding, self.padding - surplus[1], self.padding, self.padding - surplus[0]]


@torch.no_grad()
def normalize_atoms(dictionaries: Sequence[Tensor]) -> None:
    """Projects every atom onto the unit sphere, in place; atoms that are unit up to rounding stay as they are.

    Args:
        dictionaries: each (C_code, C_signal, k, k), of one dtype. An atom of norm zero, which has no direction, is left
            at zero.
    """
    norms = torch.cat([_atom_norms(dictionary) for dictionary in dictionaries])
    scales = torch.where(_is_unit(norms, dictionaries[0].dtype) | (norms == 0), 1.0, norms)
    for dictionary, scale in zip(dictionaries, scales.split([len(d) for d in dictionaries]), strict=True):
        dictionary.div_(scale[:, None, None, None])


def _atom_norms(dictionary: Tensor) -> Tensor:
    precision = torch.float32 if dictionary.device.type == "mps" else torch.float64  # mps has no float64
    return torch.linalg.vector_norm(dictionary.detach(), dim=(1, 2, 3), dtype=precision)


def _is_unit(norms: Tensor, dtype: torch.dtype) -> Tensor:
    return (norms - 1).abs() <= 8 * torch.finfo(dtype).eps


class ConvolutionalSparseCoding(ConvolutionalDictionary):
    """A stage: codes z(x) = argmin lambda |z|_1 + mu/2 |z|^2 + 1/2 |x - A(z)|^2 by unrolled FISTA.

    Args:
        signal_channels, code_channels, kernel_size, stride, padding: see `ConvolutionalDictionary`.
        sparsity: lambda, the weight of |z|_1.
        ridge: mu, the weight of |z|^2 / 2.
        num_iterations: steps of FISTA from zero, each of size step_size / |A|^2.
        nonnegative: whether codes are restricted to z >= 0.
        step_size: of FISTA, times |A|^2. Up to 1 its convergence is proven, up to 4/3 it is stable.

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
        step_size: float = 0.9,
    ) -> None:
        _check_problem(sparsity, ridge, num_iterations)
        if not 0 < step_size < LARGEST_STEP_SIZE:
            raise ValueError(f"step_size must be above 0 and below 4/3, got {step_size!r}")
        super().__init__(signal_channels, code_channels, kernel_size, stride, padding)
        self.sparsity = sparsity
        self.ridge = ridge
        self.num_iterations = num_iterations
        self.nonnegative = nonnegative
        self.step_size = step_size
        self.register_buffer("operator_norm", torch.zeros(()))
        self.register_buffer("singular_vector", torch.zeros(1, signal_channels, 0, 0))
        self.register_load_state_dict_pre_hook(_adopt_saved_signal_size)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, sparsity={self.sparsity}, ridge={self.ridge}, "
            f"num_iterations={self.num_iterations}, nonnegative={self.nonnegative}, step_size={self.step_size}"
        )

    def forward(self, signal: Tensor) -> Tensor:
        return self.encode(signal)

    def encode(self, signal: Tensor) -> Tensor:
        """z(x): signal (n, C_signal, H, W) -> codes (n, C_code, h, w), h = (H + 2 padding - k) // stride + 1.

        Gradients go through the steps of FISTA, that of its data term at the extrapolated point. None flows through
        the step size.
        """
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
        atoms: Tensor = self.dictionary
        geometry = (self.stride, self.padding, self._surplus(signal))
        if self._in_blocks and signal.shape[0] > 0:  # all steps in blocks; the frame around the signal is not of it
            if known is not None or any(self._frame(self._surplus(signal))):
                inside = torch.ones_like(signal[:1]) if known is None else known.to(atoms.dtype)
                known = self._blocks(inside.expand(-1, self.signal_channels, -1, -1))
            signal, atoms, geometry = self._blocks(signal), F.pixel_unshuffle(atoms, self.stride), (1, 0, [0, 0])
        problem = (geometry, known, self.step_size * self.operator_norm.pow(-2), sparsity, self.ridge, self.nonnegative)
        differentiated = torch.is_grad_enabled() and (signal.requires_grad or atoms.requires_grad)
        # A compiler and a tracer take the steps one by one, and find their gradient themselves.
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
        if torch.compiler.is_compiling() or tracing or not differentiated:
            return _Fista(atoms, *problem).run(signal, num_iterations)
        return _Fista(atoms.detach(), *problem).run_differentiably(signal, atoms, num_iterations)

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
        """Sets `operator_norm` to within 1%, by power iteration on A A* until it stands still.

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
        start = self.singular_vector if warm and size == self.signal_size else self._chirp(size)
        self._iterate(_power_iteration, start)

    @torch.no_grad()
    def follow_operator_norm(self) -> None:
        """Brings `operator_norm` after the dictionary by one step of power iteration. Call it after each small change.

        As spectral normalisation does (Miyato et al., ICLR 2018): singular vectors of a dictionary in training move
        slowly. No value is read, so a GPU need not wait.
        """
        if 0 not in self.signal_size:
            self._iterate(_power_steps, self.singular_vector)

    def _iterate(self, method: Callable[..., tuple[Tensor, Tensor]], start: Tensor) -> None:
        # The step size decides whether FISTA converges: float32 or better, whatever the dictionary has.
        dictionary = self.dictionary.detach().to(torch.promote_types(self.dictionary.dtype, torch.float32))
        norm, vector = method(dictionary, start.to(dictionary.dtype), self.stride, self.padding)
        self.operator_norm.copy_(norm)  # in place, as a captured step reads and writes where it did
        if vector.shape == self.singular_vector.shape:
            self.singular_vector.copy_(vector)
        else:
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


class _Fista:
    """FISTA from zero, z_t = prox(y_t + step A*(M (x - A y_t))), and its gradient; A is one convolution here.

    The proximal map is that of `ConvolutionalSparseCoding.proximal`, but passes over the codes cost time: step size and
    shrinkage are part of the atoms, the threshold of non-negative codes is a bias, and sums happen in place.
    """

    shares: tuple[list[Tensor], list[Tensor]] = ([], [])  # of a backward pass: see `_SignalGradient`

    def __init__(
        self,
        atoms: Tensor,
        geometry: tuple[int, int, list[int]],
        mask: Tensor | None,
        step: Tensor,
        sparsity: float,
        ridge: float,
        nonnegative: bool,
    ) -> None:
        device, self.dtype = atoms.device.type, atoms.dtype
        if torch.is_autocast_enabled(device) and self.dtype != torch.float64:
            self.dtype = torch.get_autocast_dtype(device)  # cast here, once, rather than in each step
        self.stride, self.padding, self.surplus = geometry
        self.mask = None if mask is None else mask.to(self.dtype)
        self.nonnegative = nonnegative
        self.shrinkage = 1 / (1 + step * ridge) if ridge else None
        self.scale = step if self.shrinkage is None else self.shrinkage * step
        self.threshold = (self.scale * -sparsity).to(self.dtype)  # below 0, as the bias of non-negative codes
        self.bias = self.threshold.expand(len(atoms)) if nonnegative else None
        # The codes' format is the atoms', and channels-last the faster one.
        self.atoms = atoms.to(self.dtype, memory_format=torch.channels_last)
        self.ascent = (self.scale * atoms).to(self.dtype, memory_format=torch.channels_last)

    def run(self, signal: Tensor, num_iterations: int, trajectory: list[tuple[Tensor, ...]] | None = None) -> Tensor:
        """z of the last step; the trajectory gets M (x - A y_t), z_t and, but for y_1 = 0, y_t of every step."""
        residual = signal = signal.to(self.dtype)
        previous = codes = self._shrink_(self.correlate(residual, self.ascent, self.bias))
        if trajectory is not None:
            trajectory.append((residual, codes))
        for weight in _extrapolations(num_iterations):
            point = codes if weight == 1 else torch.lerp(previous, codes, weight)
            synthesis = self.superpose(point, self.atoms)
            residual = signal - synthesis if self.mask is None else signal.addcmul(synthesis, self.mask, value=-1)
            moved = self.correlate(residual, self.ascent, self.bias).add_(self.shrunk(point))
            previous, codes = codes, self._shrink_(moved)
            if trajectory is not None:
                trajectory.append((residual, codes, point))
        return codes

    def run_differentiably(self, signal: Tensor, atoms: Tensor, num_iterations: int) -> Tensor:
        """As `run`, with gradients of both arguments; the atoms' takes time only where a backward pass asks for it."""
        trajectory: list[tuple[Tensor, ...]] = []
        with torch.no_grad():
            self.run(signal.detach(), num_iterations, trajectory)
        residuals, codes = [step[0] for step in trajectory], [step[1] for step in trajectory]
        points = [step[2] for step in trajectory[1:]]
        link = _AtomsGradient.apply(self, atoms, *residuals, *points)
        return _SignalGradient.apply(self, signal, link, *codes)

    def correlate(self, signal: Tensor, atoms: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(signal, atoms, bias, self.stride, self.padding)

    def superpose(self, codes: Tensor, atoms: Tensor) -> Tensor:
        return F.conv_transpose2d(codes, atoms, None, self.stride, self.padding, self.surplus)

    def shrunk(self, codes: Tensor) -> Tensor:
        return codes if self.shrinkage is None else codes * self.shrinkage.to(self.dtype)

    def atoms_gradient(self, signal: Tensor, codes: Tensor, shape: Sequence[int]) -> Tensor:
        """Of <A(codes), signal>, by atoms of this shape."""
        return conv2d_weight(signal, shape, codes, self.stride, self.padding)

    def of_shrinkage(self, gradient: Tensor, codes: Tensor) -> Tensor:
        """The gradient before the proximal map, without its factor, from that of the codes behind it."""
        return torch.ops.aten.threshold_backward(gradient, codes if self.nonnegative else codes.abs(), 0)

    def _shrink_(self, codes: Tensor) -> Tensor:
        return F.relu_(codes) if self.nonnegative else codes - codes.clamp(self.threshold, -self.threshold)


def _extrapolations(num_iterations: int) -> list[float]:
    """w_t in y_t = z_{t-2} + w_t (z_{t-1} - z_{t-2}), for t = 2, 3, ..., num_iterations; the first is 1."""
    weights, momentum = [], 1.0
    for _ in range(num_iterations - 1):
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        weights.append(1 + (momentum - 1) / following)
        momentum = following
    return weights


class _SignalGradient(torch.autograd.Function):
    """The last codes as a function of the signal, at fixed atoms.

    The gradients h_t of A*(...) + y_t and r_t of A(y_t) in each step are left with `fista`, for `_AtomsGradient`.
    """

    @staticmethod
    def forward(ctx: Any, fista: _Fista, signal: Tensor, link: Tensor, *codes: Tensor) -> Tensor:
        ctx.fista = fista
        ctx.save_for_backward(*codes)
        return codes[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        fista, codes = ctx.fista, ctx.saved_tensors
        gradient, earlier = gradients[0], None  # of z_t, and the part of z_{t-1}'s that came by y_{t+1}
        h, r, of_signal = [], [], None
        for kept, weight in zip(codes[:0:-1], reversed(_extrapolations(len(codes))), strict=True):
            h.append(fista.of_shrinkage(gradient, kept))
            r.append(fista.superpose(h[-1], fista.ascent))
            if fista.mask is not None:
                r[-1] *= fista.mask
            point = fista.shrunk(h[-1]) - fista.correlate(r[-1], fista.atoms)
            gradient = point * weight if earlier is None else earlier.add_(point, alpha=weight)
            earlier = None if weight == 1 else point.mul_(1 - weight)
        h.append(fista.of_shrinkage(gradient, codes[0]))
        if ctx.needs_input_grad[1]:
            of_signal = fista.superpose(h[-1], fista.ascent)
            for of_step in r:
                of_signal += of_step
        fista.shares = (h[::-1], r[::-1])
        return None, of_signal, fista.threshold, *[None] * len(codes)


class _AtomsGradient(torch.autograd.Function):
    """A link to `_SignalGradient`, by which the backward pass comes here after it, and only for the atoms' gradient.

    What a step adds to the codes is scale A*(R_t), and to the signal -A(y_t): bilinear, so their gradients h_t and r_t
    give that of the atoms.
    """

    @staticmethod
    def forward(ctx: Any, fista: _Fista, atoms: Tensor, *trajectory: Tensor) -> Tensor:
        ctx.fista, ctx.shape = fista, atoms.shape
        ctx.save_for_backward(*trajectory)
        return fista.threshold.view(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        fista, trajectory = ctx.fista, ctx.saved_tensors
        (h, r), fista.shares = fista.shares, ([], [])
        residuals, points = trajectory[: len(h)], trajectory[len(h) :]
        of_atoms = fista.scale * fista.atoms_gradient(torch.cat(residuals), torch.cat(h), ctx.shape)
        if points:
            of_atoms -= fista.atoms_gradient(torch.cat(r), torch.cat(points), ctx.shape)
        return None, of_atoms, *[None] * len(trajectory)


def _power_steps(
    dictionary: Tensor, vector: Tensor, stride: int, padding: int, steps: int = 1
) -> tuple[Tensor, Tensor]:
    """|A* v| for the unit vector v of the last step, and A A* v (1, C_signal, H, W)."""
    surplus = [(side + 2 * padding - dictionary.shape[-1]) % stride for side in vector.shape[-2:]]
    with torch.autocast(dictionary.device.type, enabled=False):
        for _ in range(steps):
            codes = F.conv2d(vector / torch.linalg.vector_norm(vector), dictionary, None, stride, padding)
            vector = F.conv_transpose2d(codes, dictionary, None, stride, padding, surplus)
        return torch.linalg.vector_norm(codes), vector


# An operator of its own, so that torch.compile neither unrolls the iteration nor stumbles over its stopping rule.
# A copy of this file may come from the Hub beside the installed package, so the operator's name holds a hash of the
# module's name, which itself need not be an identifier.
@library.custom_op(f"ctrl_csc_{hashlib.sha256(__name__.encode()).hexdigest()}::power_iteration", mutates_args=())
def _power_iteration(dictionary: Tensor, vector: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """Largest singular value of A, to within 1%, and A A* times its singular vector (1, C_signal, H, W)."""
    norm = dictionary.new_zeros(())
    for _ in range(MAX_POWER_ITERATIONS // POWER_ITERATIONS_PER_CHECK):
        previous = norm
        norm, vector = _power_steps(dictionary, vector, stride, padding, POWER_ITERATIONS_PER_CHECK)
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
