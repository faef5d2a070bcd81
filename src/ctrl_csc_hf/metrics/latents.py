"""Latents and codes: are they consistent round the loop, sparse, telling of the class, and of what spectrum?"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..objectives.rate_reduction import check_precision, rates_of_moments
from .statistic import Statistic, check_labels, check_matrix, check_same_shape

CHUNK = 256  # rows of a block of similarities: 51 MB against 50,000 latents
NEIGHBOURS = 10


def nearest_latent_match(latents: Tensor, reconstructed_latents: Tensor, chunk: int = CHUNK) -> float:
    """Share of the reconstructions whose nearest latent, by cosine, is their own original's: z, zh (n, d) -> [0, 1].

    Raises:
        ValueError: for no latents.
    """
    if len(latents) == 0:
        raise ValueError(f"latents must hold at least one image, got shape {tuple(latents.shape)}")
    z = F.normalize(latents.float(), dim=1)
    hits = 0
    for start in range(0, len(z), chunk):
        zh = F.normalize(reconstructed_latents[start : start + chunk].float(), dim=1)
        nearest = (zh @ z.T).argmax(dim=1)
        hits += int((nearest == torch.arange(start, start + len(nearest), device=z.device)).sum())
    return hits / len(z)


class ClosedLoopConsistency(Statistic):
    """`cosine`: the mean of cos(z, zh) over images; `match`: the share of images that their reconstruction finds again.

    It finds it if, of the latents z of all images added, the nearest to zh by cosine is its own original's. So `match`
    falls as images are added: give their number with it. Latents are kept, 8 d bytes an image for z and zh: 51 MB for
    50,000 images of d = 128.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Tensor] = []  # (2, n, d): z and zh

    def update(self, latents: Tensor, reconstructed_latents: Tensor) -> None:
        """Adds z and zh = f(g(z)), (n, d) each, of any norm; ValueError for other or unequal shapes."""
        check_matrix("latents", latents, self.batches[0].shape[2] if self.batches else None)
        check_same_shape("reconstructed_latents", reconstructed_latents, "latents", latents)
        self.batches.append(torch.stack([latents, reconstructed_latents]).detach().cpu().float())
        self.count += len(latents)

    def compute(self) -> dict[str, float]:
        """Both figures; ValueError where no image was added."""
        self._require()
        self.batches = [torch.cat(self.batches, dim=1)]
        z, zh = self.batches[0]
        return {
            "cosine": F.cosine_similarity(z, zh, dim=1).double().mean().item(),
            "match": nearest_latent_match(z, zh),
        }


class CodeSparsity(Statistic):
    """How sparse the codes of each stage are, stages counted from 1 next to the image.

    `nonzero_1`: the share of non-zero entries; `active_atoms_1`: the share of the dictionary's atoms that any of the
    images uses anywhere. The output `codes` of the encoder holds them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nonzero: list[int] = []
        self.entries: list[int] = []
        self.active: list[Tensor] = []  # (C,), bool, of each stage

    def update(self, codes: tuple[Tensor, ...]) -> None:
        """Adds a batch's codes, (n, C, h, w) of each stage.

        Raises:
            ValueError: for no stage, another number of stages or atoms than before, and stages of unequal numbers of
                images.
        """
        if self.active and len(codes) != len(self.active):
            raise ValueError(f"codes must have {len(self.active)} stages as before, got {len(codes)}")
        if not codes:
            raise ValueError("codes must hold at least one stage, got none: ask the model for output_codes=True")
        for stage, code in enumerate(codes):
            if code.ndim != 4 or len(code) != len(codes[0]):
                raise ValueError(
                    f"codes[{stage}] must have shape ({len(codes[0])}, C, h, w), as many images as codes[0], "
                    f"got {tuple(code.shape)}"
                )
            if self.active and code.shape[1] != len(self.active[stage]):
                raise ValueError(
                    f"codes[{stage}] must have {len(self.active[stage])} atoms as before, got {code.shape[1]}"
                )
        if not self.active:
            self.nonzero, self.entries = [0] * len(codes), [0] * len(codes)
            self.active = [torch.zeros(code.shape[1], dtype=torch.bool) for code in codes]
        for stage, code in enumerate(codes):
            nonzero = code.detach() != 0
            self.nonzero[stage] += int(nonzero.sum())
            self.entries[stage] += code.numel()
            self.active[stage] |= nonzero.transpose(0, 1).flatten(1).any(dim=1).cpu()
        self.count += len(codes[0])

    def compute(self) -> dict[str, float]:
        """Shares in [0, 1]; ValueError where no image was added."""
        self._require()
        figures = {}
        for stage, active in enumerate(self.active):
            figures[f"nonzero_{stage + 1}"] = self.nonzero[stage] / self.entries[stage]
            figures[f"active_atoms_{stage + 1}"] = active.float().mean().item()
        return figures


class LatentSpectrum(Statistic):
    """Spectra and coding rates of Z and Zh, from their second moments.

    `rate`, `reconstructed_rate`: R(Z) and R(Zh), `rate_reduction`: dR(Z, Zh), in nats, as `ctrl_csc_hf.coding_rate`
    and `rate_reduction` give them for all latents at once. `spectrum`, `reconstructed_spectrum`: the d eigenvalues of
    Z^T Z / n and of Zh^T Zh / n, the largest first; they add up to the mean squared norm, 1 for unit latents.
    `effective_rank`: exp of the entropy of Z's normalised eigenvalues, from 1 to d (Roy, Vetterli, "The Effective Rank:
    A Measure of Effective Dimensionality", EUSIPCO 2007, of the second moment).

    Args:
        distortion: eps^2 of the coding rate.

    Raises:
        ValueError: for a distortion that is not positive.
    """

    def __init__(self, distortion: float = 0.5) -> None:
        super().__init__()
        if not distortion > 0:
            raise ValueError(f"distortion must be positive, got {distortion!r}")
        self.distortion = distortion
        self.moments = torch.zeros(2, 0, 0, dtype=torch.float64)

    def update(self, latents: Tensor, reconstructed_latents: Tensor) -> None:
        """Adds z and zh, (n, d) each; ValueError for other or unequal shapes, and rows too long for the distortion."""
        check_matrix("latents", latents, self.moments.shape[1] or None)
        check_same_shape("reconstructed_latents", reconstructed_latents, "latents", latents)
        check_precision("latents", latents, self.distortion)
        check_precision("reconstructed_latents", reconstructed_latents, self.distortion)
        pair = torch.stack([latents, reconstructed_latents]).detach().cpu().double()
        moments = pair.mT @ pair
        self.moments = self.moments + moments if self.count else moments
        self.count += len(latents)

    def compute(self) -> dict[str, float | list[float]]:
        """The figures and both spectra; ValueError where no image was added."""
        self._require()
        reduction, rate, reconstructed_rate = rates_of_moments(
            self.moments, torch.tensor(self.count), distortion=self.distortion
        )
        spectra = torch.linalg.eigvalsh(self.moments / self.count).clamp(min=0).flip(-1)
        share = spectra[0] / spectra[0].sum()
        return {
            "rate": rate.item(),
            "reconstructed_rate": reconstructed_rate.item(),
            "rate_reduction": reduction.item(),
            "effective_rank": torch.special.entr(share).sum().exp().item(),
            "spectrum": spectra[0].tolist(),
            "reconstructed_spectrum": spectra[1].tolist(),
        }


class LatentProbe(Statistic):
    """How much of the class the latents tell: accuracies on test latents of two classifiers of the training latents.

    `linear_probe`: multinomial logistic regression on latents standardised by the training latents' mean and standard
    deviation, the minimum over W, b of |W|^2 / 2 + the sum over training images of the cross-entropy of W z + b (as
    scikit-learn's LogisticRegression with C = 1), convex, by L-BFGS in float64.
    `knn`: the majority among the 10 nearest training latents by cosine; of classes with equally many, the one with the
    nearest latent (Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, in
    its plain form).
    All latents are kept, 4 d bytes an image, and `compute` takes another 12 d bytes a training image.

    Args:
        num_classes: K; labels are integers in [0, K).
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.num_classes = num_classes
        self.training_count = 0
        self.training: list[tuple[Tensor, Tensor]] = []
        self.test: list[tuple[Tensor, Tensor]] = []

    def fit_update(self, latents: Tensor, labels: Tensor) -> None:
        """Adds training latents (n, d) and their labels (n,); ValueError for other shapes, or labels not in [0, K)."""
        self.training.append(self._checked(latents, labels))
        self.training_count += len(latents)

    def update(self, latents: Tensor, labels: Tensor) -> None:
        """Adds test latents (n, d) and their labels (n,); ValueError for other shapes, or labels not in [0, K)."""
        self.test.append(self._checked(latents, labels))
        self.count += len(latents)

    def compute(self) -> dict[str, float]:
        """Both accuracies, in [0, 1]; ValueError where training or test latents are lacking."""
        self._require()
        if not self.training_count:
            raise ValueError("LatentProbe needs training latents added by fit_update, got none")
        # Also under torch.inference_mode the regression takes gradients.
        with torch.inference_mode(False), torch.enable_grad():
            training, test = (
                [torch.cat(parts) for parts in zip(*part, strict=True)] for part in (self.training, self.test)
            )
            accuracies = {}
            for name, classify in (("linear_probe", _classify_linearly), ("knn", _classify_by_neighbours)):
                predicted = classify(training[0], training[1], test[0], self.num_classes)
                accuracies[name] = (predicted == test[1]).double().mean().item()
        return accuracies

    def _checked(self, latents: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        known = self.training or self.test
        check_matrix("latents", latents, known[0][0].shape[1] if known else None)
        check_labels(labels, len(latents), self.num_classes)
        return latents.detach().cpu().float(), labels.cpu().long()


def logistic_regression(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The W (d, K) and b (K,) that minimise |W|^2 / 2 + sum of cross-entropies: (n, d), (n,), in features' type."""
    weight = features.new_zeros(features.shape[1], num_classes).requires_grad_()
    bias = features.new_zeros(num_classes).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, tolerance_grad=1e-6, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        # Over n, so that the tolerance does not depend on the number of images.
        loss = F.cross_entropy(features @ weight + bias, labels) + weight.square().sum() / (2 * len(features))
        loss.backward()
        return loss

    optimizer.step(objective)
    return weight.detach(), bias.detach()


def _classify_linearly(training: Tensor, labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    deviation, mean = torch.std_mean(training.double(), dim=0, correction=0)
    # A direction without variance tells nothing: its noise must not be blown up.
    deviation = deviation.where(deviation > 1e-6 * deviation.max(), torch.inf)
    weight, bias = logistic_regression(training.double().sub_(mean).div_(deviation), labels, num_classes)
    return (test.double().sub_(mean).div_(deviation) @ weight + bias).argmax(dim=1)


def _classify_by_neighbours(training: Tensor, labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    training = F.normalize(training, dim=1)
    neighbours = min(NEIGHBOURS, len(training))
    # Below one vote, and the larger the nearer: it decides between classes with equally many votes.
    nearness = torch.linspace(0.9, 0.1, neighbours)
    predicted = []
    for rows in F.normalize(test, dim=1).split(CHUNK):
        classes = labels[(rows @ training.T).topk(neighbours, dim=1).indices]
        votes = F.one_hot(classes, num_classes).float()
        predicted.append((votes.sum(dim=1) + (votes * nearness[:, None]).amax(dim=1)).argmax(dim=1))
    return torch.cat(predicted)
