"""What evaluate.py measures: this package's checkpoints, PCA, the mean image, and autoencoders of diffusers."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModel

from ctrl_csc_hf import CtrlCscModel
from ctrl_csc_hf.models.sparse_coding import ConvolutionalSparseCoding

from .data import to_pixel_values

MEAN_IMAGE = "mean image"
PCA = "PCA, {} numbers"
STEPS_TO_THE_MINIMUM = 400
ROWS_AT_ONCE = 1000  # images
OVERSAMPLING, POWER_ITERATIONS = 64, 6


@dataclass(frozen=True)
class Autoencoder:
    """encode: pixels (n, 3, s, s) in [-1, 1] -> latents (n, d); decode: those -> pixels.

    codes: pixels -> the codes of every stage, where it has stages of sparse coding.
    energy_excess: pixels -> what `energy_excess` gives, where it has.
    """

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    codes: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    energy_excess: Callable[[Tensor], dict[str, float]] | None = None


def load_model(path_or_repository: str, device: torch.device | str) -> CtrlCscModel:
    """A model that train.py wrote, to evaluate.

    Raises:
        ValueError: for another model.
    """
    model = AutoModel.from_pretrained(path_or_repository)
    if not isinstance(model, CtrlCscModel):
        raise ValueError(f"{path_or_repository!r} must hold a model of train.py, got {type(model).__name__}")
    return model.eval().to(device)


def autoencoder(model: CtrlCscModel) -> Autoencoder:
    def codes(x: Tensor) -> tuple[Tensor, ...]:
        found = model.encode(x, output_codes=True).codes
        assert found is not None
        return found

    is_sparse = isinstance(model.encoder.stages[0], ConvolutionalSparseCoding)
    return Autoencoder(
        encode=lambda x: model.encode(x).latents,
        decode=lambda z: model.decode(z).reconstruction,
        codes=codes if is_sparse else None,
        energy_excess=partial(energy_excess, model) if is_sparse else None,
    )


def energy_excess(model: CtrlCscModel, images: Tensor) -> dict[str, float]:
    """How far the codes of each stage are from the minimum of its energy, which 400 steps of FISTA take for reached:
    `energy_excess_1`, ..., E(z) / E(z*) - 1, of the energies of all images (n, C, H, W) together.
    """
    encoder = model.encoder
    encoded = encoder(images, output_codes=True, output_normalized_codes=True)
    assert encoded.codes is not None and encoded.normalized_codes is not None
    signals = (encoder.first_signal(images)[0], *encoded.normalized_codes)
    excess = {}
    for index, (stage, signal, codes) in enumerate(zip(encoder.stages, signals, encoded.codes, strict=False), 1):
        smallest = stage.energy(signal, stage.solve(signal, num_iterations=STEPS_TO_THE_MINIMUM)).sum()
        excess[f"energy_excess_{index}"] = float(stage.energy(signal, codes).sum() / smallest) - 1
    return excess


def diffusers_autoencoder(path_or_repository: str, device: torch.device | str) -> Autoencoder:
    """Any autoencoder of diffusers, from a repository's root or its folder `vae`; its posterior's mode is the latent.

    Raises:
        ValueError: where there is none.
    """
    from diffusers import AutoModel as AutoDiffusersModel

    try:
        vae = AutoDiffusersModel.from_pretrained(path_or_repository)
    except (OSError, ValueError):
        try:
            vae = AutoDiffusersModel.from_pretrained(path_or_repository, subfolder="vae")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path_or_repository!r} must hold an autoencoder of diffusers, at its root or in vae/: {error}"
            ) from error
    vae = vae.eval().to(device)
    shape: list[torch.Size] = []  # of a latent, known from the first batch on

    def encode(x: Tensor) -> Tensor:
        encoded = vae.encode(x)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        shape[:] = [latents.shape[1:]]
        return latents.flatten(1)

    return Autoencoder(encode, lambda z: vae.decode(z.unflatten(1, shape[0])).sample)


def linear_rivals(images: Tensor, dims: Iterable[int], device: torch.device) -> dict[str, Autoencoder]:
    """PCA of training images (n, 3, s, s), uint8, with each number of components, and their mean image.

    The components are found by block power iteration: Halko, Martinsson and Tropp, "Finding Structure with Randomness",
    SIAM Review 53(2), 2011, algorithm 4.4. No matrix has the square of the pixels as entries.
    """
    shape = images.shape[1:]
    dims = sorted(dims)

    def rows() -> Iterator[Tensor]:
        for batch in images.split(ROWS_AT_ONCE):
            yield to_pixel_values(batch, device).flatten(1)

    mean = (torch.stack([x.double().sum(dim=0) for x in rows()]).sum(dim=0) / len(images)).float()

    def scatter(basis: Tensor) -> Tensor:
        product = torch.zeros_like(basis)
        for x in rows():
            product += (x - mean).T @ ((x - mean) @ basis)
        return product

    width = min(dims[-1] + OVERSAMPLING, shape.numel())
    basis = torch.randn(shape.numel(), width, generator=torch.Generator().manual_seed(0)).to(device)
    for _ in tqdm(range(POWER_ITERATIONS), desc="PCA of training images"):
        basis = torch.linalg.qr(scatter(basis)).Q
    vectors = basis @ torch.linalg.eigh(basis.T @ scatter(basis)).eigenvectors.flip(1)

    def pca(dim: int) -> Autoencoder:
        components = vectors[:, :dim]
        return Autoencoder(
            encode=lambda x: (x.flatten(1) - mean) @ components,
            decode=lambda z: (z @ components.T + mean).clamp(-1, 1).unflatten(1, shape),
        )

    rivals = {PCA.format(dim): pca(dim) for dim in dims}
    return rivals | {
        MEAN_IMAGE: Autoencoder(
            encode=lambda x: x.new_zeros(len(x), 1), decode=lambda z: mean.expand(len(z), -1).unflatten(1, shape)
        )
    }
