"""`make checkpoints`: brings code, cards and configurations of the models here up to date; weights stay as they are."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import ModelCard
from transformers import AutoModel

import ctrl_csc_hf  # noqa: F401  registers the model with AutoModel
from ctrl_csc_hf.hub.publishing import export

KEPT = ("model.safetensors",)  # as it is, to the bit


def main() -> None:
    for index in sorted(Path(__file__).parent.glob("*/model_index.json")):
        folder = index.parent
        kept = {name: (folder / name).read_bytes() for name in KEPT}
        with TemporaryDirectory() as scratch:
            written = export(
                AutoModel.from_pretrained(folder),
                Path(scratch) / folder.name,
                repo_id=f"checkpoints/{folder.name}",
                checkpoint=folder,
                license=ModelCard.load(folder / "README.md").data.license,
                half=True,
            )
            shutil.rmtree(folder)
            shutil.copytree(written, folder)
        for name, content in kept.items():
            (folder / name).write_bytes(content)
        print(folder)


if __name__ == "__main__":
    main()
