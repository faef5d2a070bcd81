"""What transformers' own common model tests ask of every model, asked of the model and of each half."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed
from transformers.utils import ModelOutput

from ctrl_csc_hf import CtrlCscConfig, CtrlCscDecoder, CtrlCscEncoder, CtrlCscModel

CONFIG = CtrlCscConfig(
    image_size=8, latent_dim=6, low_pass=True, stage_channels=[4, 5], kernel_sizes=[4, 4, 2], strides=[2, 2, 1],
    paddings=[1, 1, 0], sparsity=[0.05, 0.02],
)  # fmt: skip


class Case(NamedTuple):
    cls: type[PreTrainedModel]
    config: Any
    shape: tuple[int, ...]  # of one input


CASES = {
    "model": Case(CtrlCscModel, CONFIG, (3, 8, 8)),
    "encoder": Case(CtrlCscEncoder, CONFIG, (3, 8, 8)),
    "decoder": Case(CtrlCscDecoder, CONFIG, (6,)),
}
every_model = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def build(case: Case) -> PreTrainedModel:
    set_seed(0)
    return case.cls(copy.deepcopy(case.config)).eval()


def inputs(case: Case, count: int = 4) -> Tensor:
    values = torch.rand(count, *case.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return torch.nn.functional.normalize(values) if case.cls is CtrlCscDecoder else values


def tensors(output: ModelOutput) -> list[Tensor]:
    """All that an output holds, those of tuples one by one."""
    return [t for value in output.values() for t in (value if isinstance(value, tuple) else (value,))]


@every_model
def test_it_is_saved_and_loaded_to_the_bit(case: Case, tmp_path: Path) -> None:
    model = build(case)
    model.save_pretrained(tmp_path)
    loaded, report = case.cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():
        pairs = zip(tensors(loaded(inputs(case))), tensors(model(inputs(case))), strict=True)
        assert all(torch.equal(got, expected) for got, expected in pairs)


@every_model
def test_its_first_argument_is_its_main_input(case: Case) -> None:
    model, x = build(case), inputs(case)
    with torch.no_grad():
        assert torch.equal(model(**{case.cls.main_input_name: x})[0], model(x)[0])


@every_model
def test_one_seed_gives_one_model_with_no_parameter_left_unset(case: Case) -> None:
    first, second = build(case).state_dict(), build(case).state_dict()
    assert all(torch.equal(first[name], second[name]) and first[name].isfinite().all() for name in first)


@every_model
def test_an_image_has_alone_what_it_has_in_a_batch(case: Case) -> None:
    model, batch = build(case), inputs(case)
    with torch.no_grad():
        together, alone = model(batch), [model(batch[i : i + 1]) for i in range(len(batch))]
    for index, values in enumerate(zip(tensors(together), *map(tensors, alone), strict=True)):
        torch.testing.assert_close(torch.cat(values[1:]), values[0], msg=str(index))


@every_model
@pytest.mark.parametrize("by_configuration", [False, True])
def test_a_tuple_holds_what_the_output_holds(case: Case, by_configuration: bool) -> None:
    model, x = build(case), inputs(case)
    with torch.no_grad():
        expected = model(x).to_tuple()
        model.config.return_dict = not by_configuration
        found = model(x) if by_configuration else model(x, return_dict=False)
    assert type(found) is tuple and len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_model
@pytest.mark.parametrize("by_configuration", [False, True])
def test_hidden_states_are_the_codes_of_each_stage(case: Case, by_configuration: bool) -> None:
    model, x = build(case), inputs(case)
    model.config.output_hidden_states = by_configuration
    with torch.no_grad():
        output = model(x) if by_configuration else model(x, output_hidden_states=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(4, 4, 4, 4), (4, 5, 2, 2)]
    assert all(states.min() == 0 < states.max() for states in output.hidden_states)


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_loads_in_another_precision_and_gives_nearly_the_same(
    case: Case, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, x = build(case), inputs(case)
    model.save_pretrained(tmp_path)
    loaded = case.cls.from_pretrained(tmp_path, dtype=dtype)
    assert all(parameter.dtype is dtype for parameter in loaded.parameters())
    with torch.no_grad():
        got, expected = loaded(x.to(dtype))[0], model(x)[0]
    assert got.dtype is dtype
    torch.testing.assert_close(got.float(), expected, atol=0.1 if dtype is torch.bfloat16 else 1e-5, rtol=0)


@every_model
def test_gradients_are_those_of_gradient_checkpointing(case: Case) -> None:
    gradients = []
    for is_thrifty in (False, True):
        model = build(case).train()
        if is_thrifty:
            model.gradient_checkpointing_enable()
        torch.stack([t.square().sum() for t in tensors(model(inputs(case)))]).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)
