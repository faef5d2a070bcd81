"""Images of a data set that are nearest to a given one, by the cosine of their latents. Needs `datasets`.

```python
>>> index = index_images(dataset, pipe)
>>> found = retrieve(index, image, k=5)
>>> dataset[found.rows[0].tolist()]["image"]
```
"""

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import datasets
import torch
from torch import Tensor

from .encoding import encode_dataset

if TYPE_CHECKING:
    from ..models.pipeline_ctrl_csc import CtrlCscPipeline

NAME = "latents"  # of the index in the data set


@dataclass(frozen=True)
class ImageIndex:
    """
    dataset: the rows that `Retrieved.rows` counts.
    pipe: encodes what is sought.
    latents: of the rows, (n, latent_dim), unit vectors.
    backend: what searches: "faiss", through the data set's own index "latents", or "torch", which compares with every
        row. Both are exact.
    """

    dataset: datasets.Dataset
    pipe: "CtrlCscPipeline"
    latents: Tensor
    backend: Literal["faiss", "torch"]


@dataclass(frozen=True)
class Retrieved:
    """
    rows: of the data set, for each image that was given the k nearest, the nearest first: (m, k).
    cosines: of the latents, (m, k).
    """

    rows: Tensor
    cosines: Tensor


def index_images(
    dataset: datasets.Dataset, pipe: "CtrlCscPipeline", *, image_column: str = "image", batch_size: int = 64
) -> ImageIndex:
    """Encodes all images of the data set; where faiss is installed, it searches, else torch (`ImageIndex.backend`).

    Raises:
        ValueError: for a stream, which has no rows to come back to, no rows, and a column that holds no images.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(f"dataset must be a datasets.Dataset, which has numbered rows, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError("dataset must have rows, got none")
    batches = encode_dataset(
        dataset, pipe.model, pipe.image_processor, image_column=image_column, batch_size=batch_size
    )
    latents = torch.cat([batch.latents for batch in batches])
    if importlib.util.find_spec("faiss") is None:
        return ImageIndex(dataset, pipe, latents, "torch")
    import faiss

    dataset = dataset.select(range(len(dataset)))  # the index is added to it in place
    dataset.add_faiss_index_from_external_arrays(latents.numpy(), NAME, metric_type=faiss.METRIC_INNER_PRODUCT)
    return ImageIndex(dataset, pipe, latents, "faiss")


def retrieve(index: ImageIndex, image: Any, k: int = 10) -> Retrieved:
    """The k rows whose latents are nearest to that of the image, or of each of several.

    Args:
        image: what the pipeline takes: an image, a batch, or a list of these.

    Raises:
        ValueError: for k not in [1, rows of the index], and for images that the processor refuses.
    """
    if not 1 <= k <= len(index.latents):
        raise ValueError(f"k must be in [1, {len(index.latents)}], got {k!r}")
    queries = index.pipe.encode(image).float().cpu()
    if index.backend == "faiss":
        found = index.dataset.search_batch(NAME, queries.numpy(), k)
        return Retrieved(torch.as_tensor(found.total_indices), torch.as_tensor(found.total_scores))
    cosines, rows = (queries @ index.latents.T).topk(k)
    return Retrieved(rows, cosines)


__all__ = ["ImageIndex", "Retrieved", "index_images", "retrieve"]
