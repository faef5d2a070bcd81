"""The game against players written here, whose passes, losses and optimisers are their own."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ctrl_csc_hf import CtrlCscConfig, CtrlCscModel
from ctrl_csc_hf.objectives.closed_loop import ClosedLoop, ClosedLoopObjective, player_parameters

CONFIG = {
    "image_size": 8,
    "stage_channels": (4, 5),
    "kernel_sizes": (4, 4, 2),
    "strides": (2, 2, 1),
    "paddings": (1, 1, 0),
    "latent_dim": 6,
    "sparsity": 0.05,
    "ridge": 0.1,
    "num_iterations": 2,
}
SHAPES = list(zip(CONFIG["strides"], CONFIG["paddings"], strict=True))
ARCHITECTURES = list(itertools.product([False, True], [False, True]))
ARCHITECTURE_IDS = [f"{'shared' if shared else 'separate'}{'-low_pass' * low}" for shared, low in ARCHITECTURES]
OF_CODES = {"code_reduction": (0.6, 0.3), "code_consistency": 0.9, "pixel_error": 1.7}
WEIGHTS = ("decoder_consistency", "energy")
NUM_CLASSES = 4
LABELS = torch.tensor([0, 1, 1, 0, 3, 1, 0, 0, 3, 1])  # of class 2 there is none


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build_model(shared=False, low_pass=False) -> CtrlCscModel:
    """A model in training, off its initial values: running statistics, gammas, biases, output scale."""
    torch.manual_seed(0)
    options = CONFIG | {"share_dictionaries": shared}
    if low_pass:
        options |= {"low_pass": True, "sparsity": [0.05, 0.02], "num_iterations": [2, 3], "step_size": 1.3}
    model = CtrlCscModel(CtrlCscConfig(**options)).train()
    model.project_parameters()
    with torch.no_grad():
        for half in (model.encoder, model.decoder):
            for norm in half.norms:
                norm.weight.uniform_(0.7, 1.3)
                norm.bias.uniform_(-0.2, 0.3)
                norm.running_mean.uniform_(0, 0.3)
                norm.running_var.uniform_(0.5, 1.5)
        model.decoder.output_scale.uniform_(0.6, 1.1)
        model.decoder.output_bias.uniform_(-0.2, 0.2)
    return model


def batch(seed=1) -> torch.Tensor:
    return torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Reference:
    """f and g written out, with parameters theta and eta and running statistics of their own."""

    def __init__(self, model: CtrlCscModel) -> None:
        self.config = model.config
        self.last_statistics: dict[int, tuple] = {}
        self.theta = {name: p.detach().clone().requires_grad_() for name, p in model.encoder.named_parameters()}
        self.eta = {name: p.detach().clone().requires_grad_() for name, p in model.decoder.named_parameters()}
        self.shared = [name for name in self.eta if model.config.share_dictionaries and "dictionary" in name]
        halves = {"encoder": model.encoder, "decoder": model.decoder}
        self.statistics = {
            half: {name: b.clone() for name, b in module.named_buffers() if "running" in name}
            for half, module in halves.items()
        }
        self.stages = copy.deepcopy(model.encoder.stages)  # only to ask for the step size

    def batch_norm(self, half: str, layer: int, codes, update: bool, reuse: bool = False):
        mean, variance = codes.mean(dim=(0, 2, 3)), codes.var(dim=(0, 2, 3), correction=0)
        if reuse:
            mean, variance = self.last_statistics[layer]
        elif half == "encoder":
            self.last_statistics[layer] = mean.detach(), variance.detach()
        if update:
            count = codes.numel() / codes.shape[1]
            statistics = self.statistics[half]
            for name, now in (("running_mean", mean), ("running_var", variance * count / (count - 1))):
                key = f"norms.{layer}.{name}"
                statistics[key] = 0.9 * statistics[key] + 0.1 * now.detach()
        weights = self.theta if half == "encoder" else self.eta
        gamma, beta = weights[f"norms.{layer}.weight"], weights[f"norms.{layer}.bias"]
        normalized = (codes - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return gamma[:, None, None] * normalized + beta[:, None, None]

    def encode(self, x, update: bool = False, reuse: bool = False):
        """z = f(x), and the sparse-coding energy of each image per pixel; `normalized` are the stages' codes."""
        self.normalized = []
        ridge, energy = self.config.ridge, 0.0
        signal, low = x, None
        if self.config.low_pass:
            low = self.low_pass(x)
            signal = (x - F.interpolate(low, scale_factor=2, mode="bilinear")) / 0.2
        for layer, (stride, padding) in enumerate(SHAPES[:-1]):
            sparsity, steps = (
                np.broadcast_to(value, 2)[layer] for value in (self.config.sparsity, self.config.num_iterations)
            )
            momentum = [0, 0, (math.sqrt(5) - 1) / 2 / ((1 + math.sqrt(1 + (1 + math.sqrt(5)) ** 2)) / 2)]
            atoms = self.theta[f"stages.{layer}.dictionary"]
            step = self.config.step_size / self.stages[layer].operator_norm.item() ** 2
            codes = previous = 0.0
            for iteration in range(steps):
                point = codes + momentum[iteration] * (codes - previous)
                residual = signal - F.conv_transpose2d(point, atoms, None, stride, padding) if iteration else signal
                ascent = point + step * F.conv2d(residual, atoms, None, stride, padding)
                previous, codes = codes, (ascent - step * sparsity).clamp(min=0) / (1 + step * ridge)
            misfit = signal - F.conv_transpose2d(codes, atoms, None, stride, padding)
            terms = (sparsity * codes, ridge / 2 * codes**2, misfit**2 / 2)
            energy = energy + sum(term.sum(dim=(1, 2, 3)) for term in terms)
            carried = codes if layer or low is None else torch.cat([codes, low], dim=1)
            signal = self.batch_norm("encoder", layer, carried, update, reuse)
            self.normalized.append(signal)
        vector = F.conv2d(signal, self.theta["last_stage.dictionary"])
        misfit = signal - F.conv_transpose2d(vector, self.theta["last_stage.dictionary"])
        energy = energy + (misfit**2 / 2).sum(dim=(1, 2, 3))
        vector = vector[:, :, 0, 0] + 1e-3 * torch.eye(vector.shape[1])[0]
        return vector / (vector**2).sum(dim=1, keepdim=True).sqrt(), energy / 64

    def decode(self, z, update: bool = False):
        signal = F.conv_transpose2d(z[:, :, None, None], self.eta["last_stage.dictionary"])
        for layer in (1, 0):
            codes = self.batch_norm("decoder", layer, signal, update)
            stride, padding = SHAPES[layer]
            atoms = self.eta[f"stages.{layer}.dictionary"]
            codes, low = codes[:, : len(atoms)], codes[:, len(atoms) :]
            signal = F.conv_transpose2d(codes.clamp(min=0), atoms, None, stride, padding)
        scale, bias = self.eta["output_scale"], self.eta["output_bias"]
        pixels = scale[:, None, None] * signal + bias[:, None, None]
        if self.config.low_pass:
            pixels = pixels + F.interpolate(low, scale_factor=2, mode="bilinear")
        return torch.tanh(pixels)

    def low_pass(self, x):
        """Means of 4x4 pixels, 2 pixels apart, of those inside the image."""
        inside = F.pad(torch.ones_like(x), [1] * 4)
        sums = [
            F.unfold(F.pad(y, [1] * 4) if y is x else y, 4, stride=2).unflatten(1, (3, 16)).sum(dim=2)
            for y in (x, inside)
        ]
        return (sums[0] / sums[1]).unflatten(2, (4, 4))

    def encoder_terms(self, settings: ClosedLoopObjective, x, update: bool = False):
        """J of the latents and of each stage, and E: what L_f weighs, with xh = g(z) a constant."""
        z, energy = self.encode(x, update)
        codes = self.normalized
        zh, _ = self.encode(self.decode(z).detach(), reuse=True)
        codes_again = self.normalized
        return (
            utility(settings, z, zh),
            [code_difference(*pair) for pair in zip(codes, codes_again, strict=True)],
            energy.mean(),
        )

    def decoder_terms(self, settings: ClosedLoopObjective, x, update: bool = False):
        """J of the latents and of each stage, S, S_c and the error of pixels: what L_g weighs, with f(x) a constant."""
        z = self.encode(x)[0].detach()
        codes = [c.detach() for c in self.normalized]
        xh = self.decode(z, update)
        zh, _ = self.encode(xh, reuse=True)
        return (
            utility(settings, z, zh),
            [code_difference(*pair) for pair in zip(codes, self.normalized, strict=True)],
            consistency(z, zh),
            sum(F.mse_loss(c, again) for c, again in zip(codes, self.normalized, strict=True)),
            F.mse_loss(xh, x) / 2,
        )

    def gradients(self, loss, parameters) -> dict[str, torch.Tensor]:
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
        return {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(parameters.items(), found, strict=True)
        }

    @torch.no_grad()
    def project(self) -> None:
        for weights in (self.theta, self.eta):
            for name, parameter in weights.items():
                if "dictionary" in name:
                    parameter /= parameter.flatten(1).norm(dim=1)[:, None, None, None]
        for name in self.shared:
            self.eta[name].copy_(self.theta[name])
        for layer, stage in enumerate(self.stages):
            stage.dictionary.copy_(self.theta[f"stages.{layer}.dictionary"])
            stage.follow_operator_norm()

    def parameters(self) -> dict[str, torch.Tensor]:
        named = {f"encoder.{name}": p for name, p in self.theta.items()}
        return named | {f"decoder.{name}": p for name, p in self.eta.items()}

    def buffers(self) -> dict[str, torch.Tensor]:
        return {f"{half}.{name}": b for half, found in self.statistics.items() for name, b in found.items()}


def rate(z):
    n, d = z.shape
    if n == 0:
        return 0.0
    return torch.linalg.slogdet(torch.eye(d) + d / (n * 0.5) * z.T @ z).logabsdet / 2


def difference(z, zh):
    return rate(torch.cat([z, zh])) - (rate(z) + rate(zh)) / 2


def code_difference(codes, again):
    """dR of a stage, from the covariances of its codes' rows."""
    both = [c.permute(0, 2, 3, 1).reshape(-1, c.shape[1]) for c in (codes, again)]
    covariances = [rows.T @ rows / len(rows) / 0.5 for rows in both]
    covariances.append((covariances[0] + covariances[1]) / 2)
    first, second, union = (torch.linalg.eigvalsh(torch.eye(len(c)) + c).log().sum() / 2 for c in covariances)
    return union - (first + second) / 2


def of_stages(settings: ClosedLoopObjective, reductions):
    return sum(
        w * r for w, r in zip(np.broadcast_to(settings.code_reduction, len(reductions)), reductions, strict=True)
    )


def utility(settings: ClosedLoopObjective, z, zh):
    if settings.objective == "binary":
        return difference(z, zh)
    if settings.objective == "unsupervised":
        return rate(z) + difference(z, zh)
    members = [k == LABELS for k in range(NUM_CLASSES)]
    within = [sum(m.sum() / len(z) * rate(features[m]) for m in members) for features in (z, zh)]
    return rate(z) - within[0] + rate(zh) - within[1] + sum(difference(z[m], zh[m]) for m in members)


def consistency(z, zh):
    return (1 - (z * zh).sum(dim=1) / (z.norm(dim=1) * zh.norm(dim=1))).mean()


def encoder_loss(settings: ClosedLoopObjective, terms):
    j, reductions, energy = terms
    return -j - of_stages(settings, reductions) + settings.energy * energy


def decoder_loss(settings: ClosedLoopObjective, terms):
    j, reductions, s, s_codes, error = terms
    loss = j + of_stages(settings, reductions) + settings.decoder_consistency * s
    return loss + settings.code_consistency * s_codes + settings.pixel_error * error


def make_objective(objective="binary", **options) -> ClosedLoopObjective:
    return ClosedLoopObjective(objective, num_classes=NUM_CLASSES if objective == "multi" else None, **options)


def assert_close(got, expected, what="") -> None:
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9, msg=lambda text: f"{what}: {text}")


def sgd(model: CtrlCscModel, rate: float = 0.1) -> list[torch.optim.SGD]:
    return [torch.optim.SGD(parameters, rate) for parameters in player_parameters(model)]


def all_named_parameters(model: CtrlCscModel):
    return dict(model.named_parameters(remove_duplicate=False))


def backward_gradients(model: CtrlCscModel, settings: ClosedLoopObjective) -> dict[str, torch.Tensor | None]:
    ClosedLoop(model, settings, *sgd(model)).backward(batch(), LABELS)
    return {name: p.grad for name, p in all_named_parameters(model).items()}


# ---- gradients


@pytest.mark.parametrize("objective", ["binary", "multi", "unsupervised"])
@pytest.mark.parametrize(("shared", "low_pass"), ARCHITECTURES, ids=ARCHITECTURE_IDS)
def test_gradients_of_both_players_equal_two_separate_passes_with_every_weight_on_and_off(shared, low_pass, objective):
    model, reference, x = build_model(shared, low_pass), Reference(build_model(shared, low_pass)), batch()
    encoder_terms = reference.encoder_terms(make_objective(objective), x, update=True)
    decoder_terms = reference.decoder_terms(make_objective(objective), x)
    for *values, of_codes in itertools.product((0.0, 0.7), (0.0, 0.2), ({}, OF_CODES)):
        weights = dict(zip(WEIGHTS, values, strict=True)) | of_codes
        settings = make_objective(objective, **weights)
        expected_encoder = reference.gradients(encoder_loss(settings, encoder_terms), reference.theta)
        expected_decoder = reference.gradients(decoder_loss(settings, decoder_terms), reference.eta)
        for name in reference.shared:
            expected_encoder[name] = expected_decoder[name] = expected_encoder[name] + expected_decoder[name]
        for name, gradient in backward_gradients(copy.deepcopy(model), settings).items():
            half, _, local = name.partition(".")
            expected = expected_encoder if half == "encoder" else expected_decoder
            assert_close(gradient, expected[local], f"{name} with {weights}")
            assert "dictionary" not in name or gradient.abs().max() > 1e-4


@pytest.mark.parametrize("name", OF_CODES)
def test_each_term_of_the_codes_alone_has_the_gradient_of_its_definition(name):
    model, settings = build_model(), make_objective(**{name: OF_CODES[name]})
    reference = Reference(model)
    x = batch()
    expected_encoder = encoder_loss(settings, reference.encoder_terms(settings, x, update=True))
    expected_decoder = decoder_loss(settings, reference.decoder_terms(settings, x))
    expected = {f"encoder.{key}": g for key, g in reference.gradients(expected_encoder, reference.theta).items()}
    expected |= {f"decoder.{key}": g for key, g in reference.gradients(expected_decoder, reference.eta).items()}
    for parameter, gradient in backward_gradients(model, settings).items():
        assert_close(gradient, expected[parameter], parameter)


def test_a_player_that_stands_still_keeps_all_that_is_its_own_and_the_other_plays_as_before():
    settings = make_objective(**OF_CODES, decoder_consistency=0.5)
    both, alone = build_model(), build_model()
    before = copy.deepcopy(alone.encoder.state_dict())
    for model, players in ((both, ("encoder", "decoder")), (alone, ("decoder",))):
        ClosedLoop(model, settings, *sgd(model), players=players).step(batch())
    for name, tensor in alone.encoder.state_dict().items():
        assert "operator" in name or "singular" in name or torch.equal(tensor, before[name]), name
    for name, parameter in alone.decoder.named_parameters():
        assert_close(parameter, both.decoder.get_parameter(name), name)


def test_weights_of_the_codes_are_one_a_stage_or_one_for_all_and_none_is_negative():
    loop = make_objective(code_reduction=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"code_reduction must be one number or 2, one a stage, got \[0.1, 0.2, 0.3\]"):
        loop.stage_weights(2)
    for weights in ({"code_reduction": [0.1, -1.0]}, {"code_consistency": -1.0}, {"pixel_error": float("inf")}):
        with pytest.raises(ValueError, match=f"{next(iter(weights))} must be a finite number of at least 0"):
            make_objective(**weights)


@pytest.mark.parametrize(("channels", "weights"), [([4], [0.1, 0.2]), ([4, 4], [0.1, 0.2, 0.3]), ([4, 4], [0.1])])
def test_another_number_of_weights_than_of_stages_is_refused_before_the_first_step(channels, weights):
    model = CtrlCscModel(CtrlCscConfig(image_size=8 * len(channels), latent_dim=6, stage_channels=channels)).train()
    with pytest.raises(ValueError, match=f"code_reduction must be one number or {len(channels)}, one a stage, got "):
        ClosedLoop(model, make_objective(code_reduction=weights), *sgd(model))
    with pytest.raises(ValueError, match=r"code_reduction must be a finite number of at least 0, got \[\]"):
        make_objective(code_reduction=[])


@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize(("shared", "low_pass"), ARCHITECTURES, ids=ARCHITECTURE_IDS)
def test_gradient_checkpointing_changes_no_gradient_of_the_game(shared, low_pass, weight):
    settings = make_objective("multi", **dict.fromkeys(WEIGHTS, weight))
    plain, thrifty = build_model(shared, low_pass), build_model(shared, low_pass)
    thrifty.gradient_checkpointing_enable()
    assert thrifty.encoder.gradient_checkpointing and thrifty.decoder.gradient_checkpointing
    expected, got = (backward_gradients(model, settings) for model in (plain, thrifty))
    for name, gradient in got.items():
        assert_close(gradient, expected[name], name)
    for name, buffer in thrifty.named_buffers():
        assert_close(buffer, plain.get_buffer(name), name)


def test_losses_and_figures_are_those_of_the_definitions():
    model = build_model()
    settings = make_objective("multi", **dict.fromkeys(WEIGHTS, 0.5), **OF_CODES)
    reference = Reference(model)
    x = batch()
    z, _ = reference.encode(x)
    codes = reference.normalized
    xh = reference.decode(z)
    zh, _ = reference.encode(xh, reuse=True)
    pairs = list(zip(codes, reference.normalized, strict=True))
    figures = ClosedLoop(model, settings, *sgd(model)).step(x, LABELS)
    assert_close(figures.encoder_loss, encoder_loss(settings, reference.encoder_terms(settings, x)).detach())
    assert_close(figures.decoder_loss, decoder_loss(settings, reference.decoder_terms(settings, x)).detach())
    assert_close(figures.rate_reduction, difference(z, zh).detach())
    assert_close(figures.rate, rate(z).detach())
    assert_close(figures.reconstructed_rate, rate(zh).detach())
    assert_close(figures.consistency, consistency(z, zh).detach())
    assert_close(figures.code_reduction, sum(code_difference(*pair) for pair in pairs).detach())
    assert_close(figures.code_consistency, sum(F.mse_loss(*pair) for pair in pairs).detach())
    error = ((x - xh).detach().numpy() ** 2).mean(axis=(1, 2, 3))
    assert figures.psnr.item() == pytest.approx((10 * np.log10(2**2 / error)).mean(), rel=1e-5)
    assert not any(figure.requires_grad for figure in vars(figures).values())


def test_a_model_whose_outputs_are_tuples_by_configuration_plays_the_same():
    settings = make_objective(**dict.fromkeys(WEIGHTS, 0.5))
    figures = []
    for return_dict in (True, False):
        model = build_model()
        model.config.return_dict, model.config.output_hidden_states = return_dict, not return_dict
        figures.append(vars(ClosedLoop(model, settings, *sgd(model)).step(batch())))
    assert figures[0] == figures[1]


def test_a_distortion_at_which_rates_of_unit_vectors_lose_digits_is_refused_before_the_first_step():
    model = build_model()
    with pytest.raises(ValueError, match=r"distortion=1e-13 is too small for latents of d = 6"):
        ClosedLoop(model, make_objective(distortion=1e-13), *sgd(model))


# ---- steps


def optimizers(encoder_parameters, decoder_parameters) -> tuple[torch.optim.Adam, torch.optim.Adam]:
    # An epsilon this large, so that Adam does not turn the rounding of a tiny gradient into a step.
    options = {"betas": (0.5, 0.999), "eps": 1e-2}
    encoder = torch.optim.Adam(encoder_parameters, lr=2e-2, **options)
    return encoder, torch.optim.Adam(decoder_parameters, lr=5e-2, **options)


def reference_step(reference: Reference, players, settings, x) -> None:
    """Each player's own pass, at the same parameters, and then both steps."""
    losses = (
        encoder_loss(settings, reference.encoder_terms(settings, x, update=True)),
        decoder_loss(settings, reference.decoder_terms(settings, x, update=True)),
    )
    for optimizer in players:
        optimizer.zero_grad(set_to_none=True)
    for loss, weights in zip(losses, (reference.theta, reference.eta), strict=True):
        for name, gradient in reference.gradients(loss, weights).items():
            owner = reference.theta if name in reference.shared else weights
            before = owner[name].grad
            owner[name].grad = gradient if before is None else before + gradient
    for optimizer in players:
        optimizer.step()
    reference.project()


@pytest.mark.parametrize("objective", ["binary", "multi", "unsupervised"])
@pytest.mark.parametrize("weight", [0.0, 0.6])
@pytest.mark.parametrize(("shared", "low_pass"), ARCHITECTURES, ids=ARCHITECTURE_IDS)
def test_steps_equal_those_of_reference_players_with_optimizers_of_their_own(shared, low_pass, weight, objective):
    model = build_model(shared, low_pass)
    settings = make_objective(objective, **dict.fromkeys(WEIGHTS, weight))
    reference = Reference(model)
    own = [p for name, p in reference.eta.items() if name not in reference.shared]
    players = optimizers(list(reference.theta.values()), own)
    loop = ClosedLoop(model, settings, *optimizers(*player_parameters(model)))
    for seed in range(2):
        loop.step(batch(seed), LABELS)
        reference_step(reference, players, settings, batch(seed))
    parameters, buffers = reference.parameters(), reference.buffers()
    for name, parameter in all_named_parameters(model).items():
        assert_close(parameter.detach(), parameters[name].detach(), name)
    for name, expected in buffers.items():
        assert_close(model.get_buffer(name), expected, name)


@pytest.mark.parametrize(("shared", "low_pass"), ARCHITECTURES, ids=ARCHITECTURE_IDS)
def test_running_statistics_after_a_step_are_those_of_one_pass_of_the_real_batch(shared, low_pass):
    model = build_model(shared, low_pass)
    settings = make_objective("unsupervised", **dict.fromkeys(WEIGHTS, 0.5))
    reference = Reference(model)
    x = batch()
    z, _ = reference.encode(x, update=True)
    reference.decode(z, update=True)
    ClosedLoop(model, settings, *sgd(model)).step(x)
    for name, expected in reference.buffers().items():
        assert_close(model.get_buffer(name), expected, name)


@pytest.mark.parametrize(("shared", "low_pass"), ARCHITECTURES, ids=ARCHITECTURE_IDS)
def test_after_a_step_atoms_are_unit_and_norms_belong_to_them(shared, low_pass):
    model = build_model(shared, low_pass)
    settings = make_objective("multi", decoder_consistency=1.0)
    parameters = player_parameters(model)
    loop = ClosedLoop(model, settings, *(torch.optim.Adam(p, lr=0.3) for p in parameters))
    for _ in range(3):
        loop.step(batch(), LABELS)
    model.project_parameters()  # refined, after steps of this size
    for dictionary in model.dictionaries():
        norms = dictionary.dictionary.detach().flatten(1).norm(dim=1)
        assert_close(norms, torch.ones_like(norms))
    for stage in model.encoder.stages:
        unit_signals = torch.eye(stage.signal_channels * math.prod(stage.signal_size))
        matrix = stage.adjoint(unit_signals.unflatten(1, (-1, *stage.signal_size))).flatten(1)
        norm = np.linalg.norm(matrix.detach().numpy(), 2)
        assert stage.operator_norm.item() == pytest.approx(norm, rel=0.01)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_under_autocast_a_step_has_the_weights_of_the_step_before():
    def loop_and_batch():
        model = build_model().float()
        players = optimizers(*player_parameters(model))
        return ClosedLoop(model, make_objective(decoder_consistency=1.0), *players), batch().float()

    loop, x = loop_and_batch()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            loop.step(x)
    expected, _ = loop_and_batch()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):  # of its own, which knows no weights of before
            expected.step(x)
    for (name, got), wanted in zip(loop.model.named_parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(got, wanted), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_input_that_is_not_finite_gives_a_loss_that_is_not_finite(value, weight):
    model = build_model()
    settings = make_objective(**dict.fromkeys(WEIGHTS, weight))
    loop = ClosedLoop(model, settings, *optimizers(*player_parameters(model)))
    loop.step(batch())
    x = batch()
    x[3, 1, 2, 5] = value
    figures = loop.step(x)
    assert not figures.encoder_loss.isfinite() and not figures.decoder_loss.isfinite()


def test_game_learns_the_batch():
    model = build_model()
    settings = make_objective(decoder_consistency=10.0)
    encoder, decoder = player_parameters(model)
    loop = ClosedLoop(model, settings, torch.optim.Adam(encoder, 1e-4), torch.optim.Adam(decoder, 2e-2))
    consistencies = [loop.step(batch()).consistency.item() for _ in range(30)]
    assert consistencies[-1] < 0.5 * consistencies[0]


# ---- whose parameter is whose


@pytest.mark.parametrize(("shared", "low_pass"), ARCHITECTURES, ids=ARCHITECTURE_IDS)
def test_every_trained_parameter_belongs_to_one_player_and_shared_ones_to_the_encoder(shared, low_pass):
    model = build_model(shared, low_pass)
    encoder, decoder = ({id(p) for p in parameters} for parameters in player_parameters(model))
    assert not encoder & decoder
    assert encoder | decoder == {id(p) for p in model.parameters() if p.requires_grad}
    assert encoder == {id(p) for p in model.encoder.parameters()}
    dictionaries = {id(dictionary.dictionary) for dictionary in model.decoder.dictionaries()}
    norms = {id(p) for norm in model.decoder.norms for p in norm.parameters()}
    assert dictionaries <= (encoder if shared else decoder)
    assert norms <= decoder and id(model.decoder.output_scale) in decoder


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "ternary"}, r"objective must be one of \('binary', 'multi', 'unsupervised'\), got 'ternary'"),
        *(
            ({name: value}, f"{name} must be a finite number of at least 0, got {value}")
            for name in WEIGHTS
            for value in (-0.5, float("nan"), float("inf"))
        ),
        ({"distortion": 0.0}, "distortion must be positive, got 0.0"),
        ({"distortion": float("nan")}, "distortion must be positive, got nan"),
        ({"objective": "multi"}, "num_classes must be a positive integer for objective='multi', got None"),
        ({"objective": "multi", "num_classes": 0}, "num_classes must be a positive integer .* got 0"),
        ({"objective": "multi", "num_classes": -3}, "num_classes must be a positive integer .* got -3"),
    ],
)
def test_objective_that_is_not_allowed_is_an_error_that_names_argument_value_and_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        ClosedLoopObjective(**options)


def test_what_a_step_lacks_is_an_error_that_names_it():
    model = build_model()
    loop = ClosedLoop(model, make_objective("multi"), *sgd(model))
    with pytest.raises(ValueError, match="labels must be given for objective='multi', got None"):
        loop.step(batch())
    with pytest.raises(ValueError, match=r"labels must be in \[0, 4\), got values from 0 to 4"):
        loop.step(batch(), LABELS.clamp(max=2) * 2)
