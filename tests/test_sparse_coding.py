"""Convolutional sparse coding against matrices written out entry by entry, numpy and scikit-learn."""

import copy
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import ElasticNet, Lasso
from torch.autograd import gradcheck

from ctrl_csc_hf import ConvolutionalDictionary, ConvolutionalSparseCoding
from ctrl_csc_hf.models import sparse_coding

# (C_signal, C_code, k, stride, padding)
GEOMETRIES = [(2, 3, 3, 1, 1), (3, 4, 4, 2, 1), (1, 5, 2, 3, 0), (2, 2, 5, 2, 4), (3, 6, 4, 1, 0)]


def materialize(stage: ConvolutionalDictionary, size: tuple[int, int]) -> np.ndarray:
    """A as a matrix (C_signal H W, C_code h w), by placing every atom where its code says."""
    atoms = stage.dictionary.detach().double().numpy()
    _, signal_channels, k, _ = atoms.shape
    height, width = ((side + 2 * stage.padding - k) // stage.stride + 1 for side in size)
    columns = []
    for atom in atoms:
        for i in range(height):
            for j in range(width):
                framed = np.zeros((signal_channels, size[0] + 2 * stage.padding, size[1] + 2 * stage.padding))
                framed[:, i * stage.stride : i * stage.stride + k, j * stage.stride : j * stage.stride + k] = atom
                inside = framed[:, stage.padding : stage.padding + size[0], stage.padding : stage.padding + size[1]]
                columns.append(inside.reshape(-1))
    return np.stack(columns, axis=1)


def largest_singular_value(stage: ConvolutionalDictionary, size: tuple[int, int]) -> float:
    return np.linalg.svd(materialize(stage, size), compute_uv=False)[0]


def random_stage(geometry=(2, 3, 3, 1, 1), seed=0, **options) -> ConvolutionalSparseCoding:
    torch.manual_seed(seed)
    return ConvolutionalSparseCoding(*geometry, **options).double()


def random_signal(stage: ConvolutionalDictionary, size: tuple[int, int], n: int = 2) -> torch.Tensor:
    return torch.randn(n, stage.signal_channels, *size, dtype=stage.dictionary.dtype)


def objective(matrix, signal, codes, sparsity, ridge) -> float:
    return sparsity * np.abs(codes).sum() + ridge / 2 * (codes**2).sum() + ((signal - matrix @ codes) ** 2).sum() / 2


# ---- synthesis and its adjoint


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize(("kernel_size", "padding"), [(k, p) for k in range(1, 5) for p in range(k)])
def test_adjoint_is_exact_for_every_size_the_layer_accepts(kernel_size, padding, stride):
    torch.manual_seed(0)
    stage = ConvolutionalDictionary(2, 3, kernel_size, stride, padding).double()
    smallest = max(1, kernel_size - 2 * padding)
    for height in range(smallest, smallest + 6):
        width = smallest + (2 * height) % 7
        x = random_signal(stage, (height, width))
        projected = stage.adjoint(x)
        z = torch.randn_like(projected)
        synthesized = stage.synthesize(z, (height, width))
        assert synthesized.shape == x.shape
        torch.testing.assert_close((synthesized * x).sum(), (z * projected).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("size", [(7, 9), (8, 6)])
def test_synthesis_places_every_atom_where_its_code_says(geometry, size):
    stage = random_stage(geometry)
    matrix = materialize(stage, size)
    x = random_signal(stage, size)
    projected = stage.adjoint(x).detach()
    z = torch.randn_like(projected)
    synthesized = stage.synthesize(z, size).detach()
    np.testing.assert_allclose(synthesized.flatten(1).numpy(), z.flatten(1).numpy() @ matrix.T, atol=1e-12)
    np.testing.assert_allclose(projected.flatten(1).numpy(), x.flatten(1).numpy() @ matrix, atol=1e-12)


def test_default_output_size_is_the_smallest_a_stride_leaves_open():
    stage = ConvolutionalDictionary(1, 2, kernel_size=4, stride=3, padding=1)
    codes = torch.randn(1, 2, 3, 5)
    assert stage.synthesize(codes).shape == (1, 1, 2 * 3 - 2 + 4, 4 * 3 - 2 + 4)
    padded = stage.synthesize(codes, (10, 15))
    torch.testing.assert_close(padded[:, :, :8, :14], stage.synthesize(codes))


@pytest.mark.parametrize("output_size", [(7, 14), (8, 17), (11, 14), (8, 13)])
def test_output_size_that_no_signal_of_these_codes_has_is_an_error_that_names_the_allowed(output_size):
    stage = ConvolutionalDictionary(1, 2, kernel_size=4, stride=3, padding=1)
    with pytest.raises(ValueError, match=r"output_size must be between \(8, 14\) and \(10, 16\)") as error:
        stage.synthesize(torch.randn(1, 2, 3, 5), output_size)
    assert str(output_size) in str(error.value)


# ---- atoms


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_projection_makes_atoms_unit_and_repeated_changes_no_bit(dtype):
    torch.manual_seed(0)
    stage = ConvolutionalDictionary(3, 64, 4).to(dtype)
    with torch.no_grad():
        stage.dictionary.mul_(torch.logspace(-3, 3, 64, dtype=dtype)[:, None, None, None])
    stage.normalize_atoms()
    once = stage.dictionary.detach().clone()
    norms = np.linalg.norm(once.double().flatten(1).numpy(), axis=1)
    np.testing.assert_allclose(norms, 1, atol=2 * torch.finfo(dtype).eps)
    assert stage.has_unit_atoms()
    stage.normalize_atoms()
    assert torch.equal(stage.dictionary, once)


def test_projection_keeps_directions_and_leaves_an_atom_of_zero_alone():
    stage = ConvolutionalDictionary(2, 3, 3).double()
    with torch.no_grad():
        stage.dictionary.mul_(5)
        stage.dictionary[1] = 0
    before = stage.dictionary.detach().clone()
    assert not stage.has_unit_atoms()
    stage.normalize_atoms()
    torch.testing.assert_close(stage.dictionary.detach(), before / 5)


def test_new_atoms_are_unit():
    norms = ConvolutionalDictionary(3, 32, 4).dictionary.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(32))


def test_atoms_are_unit_after_optimizer_step_and_projection():
    stage = random_stage()
    optimizer = torch.optim.Adam(stage.parameters(), lr=0.1)
    x = random_signal(stage, (6, 6))
    stage.energy(x, stage.encode(x)).sum().backward()
    optimizer.step()
    assert not stage.has_unit_atoms()
    stage.normalize_atoms()
    np.testing.assert_allclose(stage.dictionary.detach().flatten(1).norm(dim=1).numpy(), 1, atol=1e-14)


# ---- the operator norm


@pytest.mark.parametrize("size", [(5, 5), (8, 11), (12, 12)])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_operator_norm_is_the_largest_singular_value(geometry, size):
    stage = random_stage(geometry)
    stage.update_operator_norm(size)
    assert stage.operator_norm.item() == pytest.approx(largest_singular_value(stage, size), rel=0.01)
    assert stage.signal_size == size


@pytest.mark.parametrize("pattern", ["equal", "constant", "checkerboard", "impulse", "wave"])
def test_operator_norm_is_right_for_dictionaries_that_are_far_from_random(pattern):
    stage = random_stage((2, 4, 4, 2, 1))
    i, j = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    kernel = {
        "equal": torch.randn(4, 4),
        "constant": torch.ones(4, 4),
        "checkerboard": (-1.0) ** (i + j),
        "impulse": ((i == 1) & (j == 2)).float(),
        "wave": torch.cos(torch.pi / 3 * i),
    }[pattern]
    with torch.no_grad():
        stage.dictionary.mul_(0.01).add_(kernel)
    stage.normalize_atoms()
    for size in [(6, 6), (12, 10)]:
        stage.update_operator_norm(size)
        assert stage.operator_norm.item() == pytest.approx(largest_singular_value(stage, size), rel=0.01)


def test_operator_norm_is_right_at_the_size_of_a_real_stage():
    stage = random_stage((3, 16, 4, 2, 1))
    stage.update_operator_norm((16, 16))
    assert stage.operator_norm.item() == pytest.approx(largest_singular_value(stage, (16, 16)), rel=0.01)


def test_operator_norm_follows_the_signal_to_another_size_and_back():
    stage = random_stage((2, 4, 4, 2, 1))
    norms = {}
    for size in [(4, 4), (14, 10), (4, 4)]:
        stage.encode(random_signal(stage, size))
        norms[size] = stage.operator_norm.item()
        assert norms[size] == pytest.approx(largest_singular_value(stage, size), rel=0.01)
    assert norms[14, 10] > norms[4, 4]


def test_operator_norm_is_right_after_optimizer_steps():
    stage = random_stage((2, 4, 4, 2, 1), sparsity=0.02)
    optimizer = torch.optim.Adam(stage.parameters(), lr=0.1)
    x = random_signal(stage, (8, 8))
    start = stage.operator_norm.item()
    for _ in range(3):
        optimizer.zero_grad()
        stage.energy(x, stage.encode(x)).sum().backward()
        optimizer.step()
        stage.normalize_atoms()
        stage.update_operator_norm()
        assert stage.operator_norm.item() == pytest.approx(largest_singular_value(stage, (8, 8)), rel=0.01)
    assert stage.operator_norm.item() != pytest.approx(start, rel=0.01)


def test_loaded_stage_codes_bit_for_bit_like_the_saved_one():
    stage = random_stage((2, 4, 4, 2, 1), num_iterations=5).float()
    x = random_signal(stage, (9, 8))
    codes = stage.encode(x)
    fresh = ConvolutionalSparseCoding(2, 4, 4, 2, 1, num_iterations=5)
    fresh.encode(torch.randn(1, 2, 6, 6))  # its norm belongs to other signals and other atoms
    assert not fresh.load_state_dict(stage.state_dict()).missing_keys
    assert fresh.signal_size == (9, 8)
    assert torch.equal(fresh.operator_norm, stage.operator_norm)
    assert fresh.operator_norm.item() == pytest.approx(largest_singular_value(fresh, (9, 8)), rel=0.01)
    assert torch.equal(fresh.encode(x), codes)
    other = random_signal(stage, (12, 5))
    assert torch.equal(fresh.encode(other), stage.encode(other))
    assert fresh.operator_norm.item() == pytest.approx(largest_singular_value(fresh, (12, 5)), rel=0.01)


def test_operator_norm_is_right_in_bfloat16():
    stage = random_stage((3, 8, 4, 2, 1)).bfloat16()
    codes = stage.encode(random_signal(stage, (10, 10)))
    assert codes.dtype == stage.operator_norm.dtype == torch.bfloat16
    assert codes.isfinite().all()
    assert stage.operator_norm.item() == pytest.approx(largest_singular_value(stage, (10, 10)), rel=0.01)


def test_operator_norm_is_right_under_autocast():
    stage = random_stage((3, 8, 4, 2, 1)).float()
    with torch.autocast("cpu", torch.bfloat16):
        stage.encode(random_signal(stage, (10, 10)))
    assert stage.operator_norm.dtype == torch.float32
    assert stage.operator_norm.item() == pytest.approx(largest_singular_value(stage, (10, 10)), rel=0.01)


def assert_compiled_matches_eager(backend: str, sizes: list[tuple[int, int]]) -> None:
    torch.compiler.reset()
    stage = random_stage((1, 2, 3, 2, 1), num_iterations=3).float()
    compiled = torch.compile(stage, fullgraph=True, backend=backend)
    for size in sizes:
        x = random_signal(stage, size).requires_grad_()
        stage.dictionary.grad = None
        codes = compiled(x)
        codes.square().sum().backward()
        gradients = x.grad, stage.dictionary.grad
        assert stage.signal_size == size
        assert stage.operator_norm.item() == pytest.approx(largest_singular_value(stage, size), rel=0.01)

        eager = random_stage((1, 2, 3, 2, 1), num_iterations=3).float()
        signal = x.detach().clone().requires_grad_()
        expected = eager.encode(signal)
        expected.square().sum().backward()
        torch.testing.assert_close(codes, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradients, (signal.grad, eager.dictionary.grad), rtol=1e-4, atol=1e-5)


def test_stage_compiles_into_one_graph_with_the_right_operator_norm():
    assert_compiled_matches_eager("aot_eager", [(6, 6)])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_stage_follows_the_signal_to_other_sizes():
    assert_compiled_matches_eager("inductor", [(6, 6), (9, 7), (12, 12)])


def test_operator_norm_leaves_the_global_random_generator_alone():
    stage = random_stage()
    state = torch.get_rng_state()
    stage.update_operator_norm((7, 7))
    stage.encode(torch.ones(1, 2, 5, 6, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), state)


def test_operator_norm_without_a_size_is_an_error():
    with pytest.raises(ValueError, match=r"signal_size must be positive, got \(0, 0\)"):
        ConvolutionalSparseCoding(1, 2, 3).update_operator_norm()
    with pytest.raises(ValueError, match=r"signal_size must be positive, got \(4, 0\)"):
        ConvolutionalSparseCoding(1, 2, 3).update_operator_norm((4, 0))


# ---- sparse coding


def reference_codes(matrix, signal, step, sparsity, ridge, iterations, nonnegative=True, accelerated=True):
    """Beck and Teboulle's FISTA (or ISTA) on a matrix, from zero."""

    def shrink(v):
        shrunk = np.sign(v) * np.maximum(np.abs(v) - step * sparsity, 0)
        if nonnegative:
            shrunk = np.maximum(v - step * sparsity, 0)
        return shrunk / (1 + step * ridge)

    previous = extrapolated = np.zeros(matrix.shape[1])
    t = 1.0
    for _ in range(iterations):
        gradient = matrix.T @ (matrix @ extrapolated - signal)
        codes = shrink(extrapolated - step * gradient)
        t_next = (1 + np.sqrt(1 + 4 * t**2)) / 2
        extrapolated = codes + ((t - 1) / t_next * (codes - previous) if accelerated else 0)
        previous, t = codes, t_next
    return previous


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize(("iterations", "accelerated"), [(1, False), (2, False), (8, True), (20, True)])
@pytest.mark.parametrize("geometry", [(2, 3, 3, 1, 1), (1, 5, 4, 3, 2)])
def test_codes_are_those_of_fista_and_its_first_two_steps_those_of_ista(
    geometry, iterations, accelerated, ridge, nonnegative
):
    stage = random_stage(geometry, sparsity=0.15, ridge=ridge, num_iterations=iterations, nonnegative=nonnegative)
    size = (6, 7)
    x = random_signal(stage, size)
    codes = stage.encode(x).detach().flatten(1).numpy()
    matrix, step = materialize(stage, size), 0.9 / stage.operator_norm.item() ** 2
    for signal, got in zip(x.flatten(1).numpy(), codes, strict=True):
        expected = reference_codes(matrix, signal, step, 0.15, ridge, iterations, nonnegative, accelerated)
        assert 0 < np.count_nonzero(expected) < expected.size
        np.testing.assert_allclose(got, expected, atol=1e-12)
        if iterations == 8:
            ista = reference_codes(matrix, signal, step, 0.15, ridge, iterations, nonnegative, False)
            assert np.abs(got - ista).max() > 1e-3


SOLVER = {"fit_intercept": False, "max_iter": 200_000, "tol": 1e-12}


@pytest.mark.parametrize("geometry", [(2, 4, 3, 1, 1), (1, 6, 4, 2, 1), (3, 8, 2, 2, 0)])
@pytest.mark.parametrize(("nonnegative", "ridge"), [(True, 0.0), (True, 0.2), (False, 0.0), (False, 0.2)])
def test_many_iterations_reach_the_minimum_that_scikit_learn_finds(geometry, nonnegative, ridge):
    sparsity, size = 0.2, (6, 8)
    stage = random_stage(geometry, sparsity=sparsity, ridge=ridge, num_iterations=1500, nonnegative=nonnegative)
    x = random_signal(stage, size, n=1)
    with torch.no_grad():
        codes = stage.encode(x).flatten().numpy()
    matrix, signal = materialize(stage, size), x.flatten().numpy()
    n = len(signal)  # scikit-learn divides the squared error by 2n
    if ridge:
        weight = sparsity + ridge
        solver = ElasticNet(weight / n, l1_ratio=sparsity / weight, positive=nonnegative, **SOLVER)
    else:
        solver = Lasso(sparsity / n, positive=nonnegative, **SOLVER)
    solution = solver.fit(matrix, signal).coef_
    assert 0 < np.count_nonzero(solution) < solution.size
    ours, theirs = (objective(matrix, signal, z, sparsity, ridge) for z in (codes, solution))
    assert ours == pytest.approx(theirs, rel=1e-5)
    if nonnegative:
        assert codes.min() >= 0
    if ridge:  # strictly convex: the minimiser is one
        np.testing.assert_allclose(codes, solution, atol=1e-4)


def test_more_iterations_come_closer_to_the_minimum():
    energies = []
    for iterations in (1, 2, 4, 16, 64, 256):
        stage = random_stage((2, 4, 3, 1, 1), num_iterations=iterations)
        x = random_signal(stage, (6, 6))
        energies.append(stage.energy(x, stage.encode(x)).sum().item())
    assert energies == sorted(energies, reverse=True)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_energy_is_the_objective_of_each_image_with_the_ridge_term(geometry):
    size = (7, 8)
    stage = random_stage(geometry, sparsity=0.3, ridge=0.7, nonnegative=False)
    x = random_signal(stage, size, n=3)
    z = torch.randn_like(stage.adjoint(x))
    energy = stage.energy(x, z)
    assert energy.shape == (3,)
    matrix = materialize(stage, size)
    expected = [
        objective(matrix, a.flatten().numpy(), b.flatten().numpy(), 0.3, 0.7) for a, b in zip(x, z, strict=True)
    ]
    np.testing.assert_allclose(energy.detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.5])
@pytest.mark.parametrize("step", [0.3, 1.7])
def test_proximal_map_is_the_minimiser_that_brute_force_finds(step, ridge, nonnegative):
    stage = random_stage(sparsity=0.4, ridge=ridge, nonnegative=nonnegative)
    points = np.linspace(-3, 3, 25)
    grid = np.linspace(0 if nonnegative else -3, 3, 60_001)
    cost = step * (0.4 * np.abs(grid) + ridge / 2 * grid**2) + (grid - points[:, None]) ** 2 / 2
    got = stage.proximal(torch.from_numpy(points), torch.tensor(step, dtype=torch.float64))
    np.testing.assert_allclose(got.numpy(), grid[cost.argmin(axis=1)], atol=1.1e-4)


def test_signed_codes_change_sign_with_the_signal_and_nonnegative_ones_stay():
    signed = random_stage(nonnegative=False, num_iterations=6)
    x = random_signal(signed, (6, 6))
    codes = signed.encode(x)
    assert codes.min() < 0 < codes.max()
    torch.testing.assert_close(signed.encode(-x), -codes)
    stage = random_stage(num_iterations=6)
    assert stage.encode(x).min() == stage.encode(-x).min() == 0


# ---- gradients


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("geometry", [(1, 2, 3, 1, 1), (2, 2, 2, 2, 0)])
def test_gradients_are_those_of_finite_differences_with_the_step_size_held(geometry, nonnegative):
    stage = random_stage(geometry, ridge=0.2, num_iterations=4, nonnegative=nonnegative)
    size = (5, 4)
    x = random_signal(stage, size, n=1).requires_grad_()
    z = torch.randn_like(stage.adjoint(x)).requires_grad_()
    stage.update_operator_norm(size)
    assert gradcheck(lambda signal, _: stage.encode(signal), (x, stage.dictionary))
    assert gradcheck(lambda codes, _: stage.synthesize(codes, size), (z, stage.dictionary))
    assert gradcheck(lambda signal, _: stage.adjoint(signal), (x, stage.dictionary))
    assert gradcheck(lambda signal, codes, _: stage.energy(signal, codes), (x, z, stage.dictionary))
    assert gradcheck(lambda signal, _: stage.energy(signal, stage.encode(signal)), (x, stage.dictionary))


def test_gradient_outlives_an_encoding_at_another_size_and_a_refresh_of_the_norm():
    stage = random_stage()
    x, other = random_signal(stage, (5, 5)), random_signal(stage, (9, 8))
    (expected,) = torch.autograd.grad(stage.encode(x).square().sum(), stage.dictionary)
    codes = stage.encode(x)
    stage.encode(other)
    stage.update_operator_norm((7, 7))
    (gradient,) = torch.autograd.grad(codes.square().sum(), stage.dictionary)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("asked", ["signal", "dictionary", "both"])
def test_a_backward_pass_pays_for_the_gradients_that_are_asked_for_alone(asked):
    stage = random_stage((2, 3, 4, 2, 1), num_iterations=4)
    x = random_signal(stage, (8, 8)).requires_grad_()
    inputs = {"signal": [x], "dictionary": [stage.dictionary], "both": [x, stage.dictionary]}[asked]
    with torch.profiler.profile() as profile:
        found = torch.autograd.grad(stage.encode(x).square().sum(), inputs)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls.get("aten::convolution_backward", 0) == (0 if asked == "signal" else 2)
    expected = torch.autograd.grad(encode_by_autograd(stage, x).square().sum(), inputs)
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gradients_are_those_of_autograd_through_the_same_steps(geometry, ridge, nonnegative):
    stage = random_stage(geometry, sparsity=0.05, ridge=ridge, num_iterations=5, nonnegative=nonnegative)
    x = random_signal(stage, (8, 9)).requires_grad_()
    known = torch.rand(1, 1, 8, 9) < 0.8
    for options in ({}, {"known": known, "num_iterations": 1}, {"known": known, "sparsity": 0.1}):
        codes, reference = stage.solve(x, **options), encode_by_autograd(stage, x, **options)
        torch.testing.assert_close(codes, reference)
        weights = torch.randn_like(codes)
        for found, expected in zip(
            *(torch.autograd.grad((z * weights).sum(), (x, stage.dictionary)) for z in (codes, reference)), strict=True
        ):
            torch.testing.assert_close(found, expected)


def encode_by_autograd(stage, signal, known=None, sparsity=None, num_iterations=None):
    """FISTA by the definition, with the stage's own maps."""
    step, sparsity = 0.9 / stage.operator_norm**2, stage.sparsity if sparsity is None else sparsity
    stage = copy.copy(stage)
    stage.sparsity = sparsity
    codes = previous = torch.zeros_like(stage.adjoint(signal))
    momentum = 1.0
    for iteration in range(stage.num_iterations if num_iterations is None else num_iterations):
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        point = codes + (momentum - 1) / following * (codes - previous) if iteration else codes
        momentum = following if iteration else momentum
        residual = signal - stage.synthesize(point, tuple(signal.shape[-2:]))
        residual = residual if known is None else residual * known
        previous, codes = codes, stage.proximal(point + step * stage.adjoint(residual), step)
    return codes


# ---- promises to the user


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signal_channels": 0}, "signal_channels must be a positive integer, got 0"),
        ({"code_channels": -2}, "code_channels must be a positive integer, got -2"),
        ({"kernel_size": 0}, "kernel_size must be a positive integer, got 0"),
        ({"stride": 0}, "stride must be a positive integer, got 0"),
        ({"padding": -1}, "padding must be at least 0 and less than kernel_size=3, got -1"),
        ({"padding": 3}, "padding must be at least 0 and less than kernel_size=3, got 3"),
        ({"sparsity": -0.1}, "sparsity must be a finite number of at least 0, got -0.1"),
        ({"sparsity": float("nan")}, "sparsity must be a finite number of at least 0, got nan"),
        ({"ridge": float("inf")}, "ridge must be a finite number of at least 0, got inf"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_errors_that_name_argument_value_and_what_is_allowed(options, message):
    arguments = {"signal_channels": 1, "code_channels": 2, "kernel_size": 3} | options
    with pytest.raises(ValueError, match=message):
        ConvolutionalSparseCoding(**arguments)


@pytest.mark.parametrize("signal_channels", [3, 8])
def test_of_no_signals_there_are_no_codes(signal_channels):
    stage = ConvolutionalSparseCoding(signal_channels, 5, 4, 2, 1)
    signal = torch.zeros(0, signal_channels, 8, 8)
    codes = stage(signal)
    assert codes.shape == stage.adjoint(signal).shape == (0, 5, 4, 4)
    assert stage.synthesize(codes).shape == signal.shape and stage.energy(signal, codes).shape == (0,)


def test_stage_learns_alone_in_five_lines():
    torch.manual_seed(0)
    images = torch.rand(4, 3, 12, 12) * 2 - 1
    stage = ConvolutionalSparseCoding(3, 16, kernel_size=4, stride=2, padding=1, num_iterations=8)
    optimizer = torch.optim.Adam(stage.parameters(), lr=0.02)
    energies = []
    for _ in range(15):
        energy = stage.energy(images, stage(images)).mean()
        energy.backward()
        optimizer.step(), optimizer.zero_grad(), stage.normalize_atoms(), stage.update_operator_norm()
        energies.append(energy.item())
    assert energies[-1] < 0.9 * energies[0]
    assert stage.synthesize(stage(images)).shape == images.shape


@pytest.mark.parametrize("name", ["plain", "my model (1)", "modèle", "模型", "a+b@c", "0", "a.b"])
def test_a_copy_of_the_file_under_any_module_name_has_an_operator_of_its_own(name):
    path = Path(sparse_coding.__file__)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module._power_iteration._qualname != sparse_coding._power_iteration._qualname
    stage = module.ConvolutionalSparseCoding(2, 4, 3)
    stage.update_operator_norm((6, 6))
    assert stage.operator_norm > 0
