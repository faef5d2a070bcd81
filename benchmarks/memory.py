"""Memory of training at the presets' sizes, as a Markdown table: `python benchmarks/memory.py`.

State is weights, gradients, Adam's two moments and the average, all float32. Activations are what one step of the game
(objective `binary`, self-consistency in the decoder's loss) keeps for its backward pass, under bf16 autocast, counted
by the tensors that autograd saves; they grow with the batch, and so are given per image.
"""

import torch

from ctrl_csc_hf import CtrlCscConfig, CtrlCscModel
from ctrl_csc_hf.objectives.closed_loop import ClosedLoop, ClosedLoopObjective, player_parameters
from ctrl_csc_hf.training.presets import load_preset

PRESETS = ("cifar10", "imagenet64", "imagenet128")
COPIES = 5  # weights, gradients, two moments, average
IMAGES = 4
GIGABYTE = 1e9


def state_bytes(model: CtrlCscModel) -> int:
    return 4 * COPIES * sum(parameter.numel() for parameter in model.parameters())


def activation_bytes(model: CtrlCscModel, images: int = IMAGES) -> float:
    """Per image; a storage that several operations save counts once, parameters do not."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    optimizers = [torch.optim.Adam(player, 1e-4) for player in player_parameters(model)]
    loop = ClosedLoop(model.train(), ClosedLoopObjective(decoder_consistency=10.0), *optimizers)
    size = model.config.image_size
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        loop.backward(torch.rand(images, model.config.num_channels, size, size) * 2 - 1)
    return sum(saved.values()) / images


def main() -> None:
    print("| preset | parameters | state | activations an image | images a process that fit in 80 GB |")
    print("| --- | --- | --- | --- | --- |")
    for name in PRESETS:
        model = CtrlCscModel(CtrlCscConfig(**load_preset(name)["model"]))
        state, activations = state_bytes(model), activation_bytes(model)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        fit = int((80 * GIGABYTE - state) / activations)
        print(
            f"| {name} | {parameters / 1e6:.1f} million | {state / GIGABYTE:.2f} GB | {activations / 1e6:.1f} MB "
            f"| {fit:,} |"
        )


if __name__ == "__main__":
    main()
