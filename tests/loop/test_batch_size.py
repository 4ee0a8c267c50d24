"""The batch size is that of the examples whose gradients are in ``.grad``."""

import pickle
import warnings
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from sirfshampoo import SIRFShampoo, recipe
from sirfshampoo.optimizer import get_batch_size


def train_on(model: nn.Module, *batches: Tensor) -> None:
    for x in batches:
        (model(x).square().mean() / len(batches)).backward()


def test_get_batch_size_is_the_first_tensors_leading_dimension() -> None:
    a, b = torch.zeros(3, 2), torch.zeros(5)
    assert get_batch_size((a, b)) == 3
    assert get_batch_size((None, {"x": [torch.tensor(1.0), b]}, a)) == 5
    with pytest.raises(ValueError, match="'batch_size'"):
        get_batch_size((None, "text", torch.tensor(1.0)))


def test_micro_batches_add_up_until_the_next_step() -> None:
    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model)
    for sizes in [(4,), (2, 3, 1), (5,)]:
        optimizer.zero_grad()
        train_on(model, *(torch.randn(n, 3) for n in sizes))
        assert optimizer.batch_size == sum(sizes)
        optimizer.step()
        assert optimizer.batch_size == sum(sizes)


@pytest.mark.parametrize("where", ["evaluation mode", "no_grad"])
def test_forward_passes_without_training_do_not_count(where: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model)
    train_on(model, torch.randn(4, 3))
    with torch.set_grad_enabled(where != "no_grad"):
        model.train(where != "evaluation mode")(torch.randn(100, 3))
    model.train()
    assert optimizer.batch_size == 4
    optimizer.step()
    with torch.no_grad():
        model(torch.randn(100, 3))
    train_on(model, torch.randn(5, 3))
    assert optimizer.batch_size == 5


def test_zero_grad_between_forward_and_backward_keeps_the_count() -> None:
    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model)
    loss = model(torch.randn(4, 3)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert optimizer.batch_size == 4


@pytest.mark.parametrize("size", [4, 9])
def test_integer_hook_and_callable_agree(size: int) -> None:
    x = torch.randn(4, 3)
    results = []
    for batch_size in (size, get_batch_size, lambda inputs: size):
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        optimizer = SIRFShampoo(model, beta2=0.5, batch_size=batch_size)
        for _ in range(3):
            optimizer.zero_grad()
            train_on(model, x)
            optimizer.step()
        results.append(model.weight.detach().clone())
    by_number, by_hook, by_callable = results
    assert torch.equal(by_number, by_callable)
    assert torch.equal(by_number, by_hook) == (size == 4)


def test_callable_gets_the_tuple_of_positional_inputs() -> None:
    seen: list[Any] = []

    def count(inputs: tuple[Tensor, ...]) -> int:
        seen.append(inputs)
        return 6

    model = nn.Bilinear(3, 2, 1)
    optimizer = SIRFShampoo(model, batch_size=count)
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    model(x, y).sum().backward()
    optimizer.step()
    ((first, second),) = seen
    assert first is x
    assert second is y
    assert optimizer.batch_size == 6


def test_keyword_inputs_are_found() -> None:
    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model)
    model(input=torch.randn(7, 3)).sum().backward()
    optimizer.step()
    assert optimizer.batch_size == 7


@pytest.mark.parametrize("wrong", [2.0, None, True, -1, "4"])
def test_callable_must_return_a_count(wrong: Any) -> None:
    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model, batch_size=lambda inputs: wrong)
    with pytest.raises(ValueError, match="Argument 'batch_size' must return"):
        model(torch.randn(4, 3))
    assert optimizer.batch_size == 0


@pytest.mark.parametrize("steps_before", [0, 1])
def test_step_without_a_count_is_an_error_that_changes_nothing(
    steps_before: int,
) -> None:
    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model)
    for _ in range(steps_before):
        train_on(model, torch.randn(4, 3))
        optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="pass 'batch_size' as an integer"):
        optimizer.step()
    assert optimizer.global_step == steps_before
    assert all(
        torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)
    )


def test_integer_installs_no_hook_and_an_optimizer_takes_its_hook_along() -> None:
    model = nn.Linear(3, 2)
    SIRFShampoo(model, batch_size=3)
    assert not model._forward_hooks
    optimizer = SIRFShampoo(model)
    assert len(model._forward_hooks) == 1
    for _ in range(3):
        optimizer = SIRFShampoo(model)
    assert len(model._forward_hooks) == 1
    del optimizer
    assert not model._forward_hooks


def test_callable_with_two_required_parameters_gets_keyword_inputs() -> None:
    seen: list[Any] = []

    def count(
        inputs: tuple[Tensor, ...], keywords: dict[str, Tensor], n: int = 1
    ) -> int:
        seen.append((inputs, keywords))
        return 6 * n

    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model, batch_size=count)
    x = torch.randn(4, 3)
    model(input=x).sum().backward()
    assert optimizer.batch_size == 6
    (((), keywords),) = seen
    assert keywords["input"] is x


@pytest.mark.parametrize("by", ["optimizer", "model"])
@pytest.mark.parametrize("backward", [True, False])
def test_a_discarded_batch_does_not_count(by: str, backward: bool) -> None:
    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model)
    loss = model(torch.randn(9, 3)).square().mean()
    if backward:
        loss.backward()
        (optimizer if by == "optimizer" else model).zero_grad()
    train_on(model, torch.randn(4, 3))
    optimizer.step()
    assert optimizer.batch_size == 4


def test_training_in_evaluation_mode_counts_when_gradients_arrive() -> None:
    model = nn.Linear(3, 2).eval()
    optimizer = SIRFShampoo(model)
    loss = model(torch.randn(4, 3)).square().mean()
    assert optimizer.batch_size == 0
    loss.backward()
    assert optimizer.batch_size == 4
    optimizer.step()


def test_a_second_backward_pass_through_a_graph_counts_again_after_a_step() -> None:
    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model)
    loss = model(torch.randn(4, 3)).square().mean()
    for _ in range(2):
        loss.backward(retain_graph=True)
    assert optimizer.batch_size == 4
    # the step changes what the graph was computed with: only the count matters here
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.0
    optimizer.zero_grad()
    loss.backward()
    assert optimizer.batch_size == 4
    optimizer.step()


def test_gradients_that_no_backward_pass_made_take_the_forward_pass() -> None:
    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model)
    model(torch.randn(4, 3))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.batch_size == 4


@pytest.mark.parametrize("early_stop", [True, False])
def test_checkpointed_calls_in_one_backward_pass_count_once_each(
    early_stop: bool,
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = SIRFShampoo(model)
    with set_checkpoint_early_stop(early_stop):
        losses = [
            checkpoint(model, torch.randn(n, 3), use_reentrant=False).square().mean()
            for n in (4, 5, 6)
        ]
        sum(losses).backward()
    assert optimizer.batch_size == 15


def test_a_backward_pass_that_fails_leaves_nothing_behind() -> None:
    def refuse(gradient: Tensor) -> None:
        raise KeyError("no")

    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model)
    good, bad = model(torch.randn(5, 3)), model(torch.randn(4, 3))
    optimizer_input = bad.square()
    handle = model.weight.register_hook(refuse)
    with pytest.raises(KeyError):
        optimizer_input.mean().backward()
    handle.remove()
    optimizer.zero_grad()
    good.square().mean().backward()
    assert optimizer.batch_size == 5


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_micro_batches_add_up_when_gradients_are_differentiable() -> None:
    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model)
    for n in (4, 5, 6):
        model(torch.randn(n, 3)).square().mean().backward(create_graph=True)
    assert optimizer.batch_size == 15
    optimizer.zero_grad()


def test_a_model_may_hold_its_optimizer_and_be_copied() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    model.optimizer = SIRFShampoo(model)
    for copied in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(copied._forward_hooks) == 1
        train_on(copied, torch.randn(4, 3))
        copied.optimizer.step()
        assert copied.optimizer.batch_size == 4
        assert model.optimizer.batch_size == 0
        assert not torch.equal(copied[0].weight, model[0].weight)


def test_outputs_may_be_traced_saved_and_of_a_class_with_slots(tmp_path: Any) -> None:
    @dataclass(slots=True)
    class Output:
        y: Tensor

    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return Output(super().forward(x))

    model = Model(3, 2)
    optimizer = SIRFShampoo(model)
    model(torch.randn(4, 3)).y.sum().backward()
    assert optimizer.batch_size == 4

    plain = nn.Linear(3, 2)
    watching = SIRFShampoo(plain)
    torch.save(plain(torch.randn(4, 3)), tmp_path / "output.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(plain, torch.randn(4, 3))
    assert watching.batch_size == 4


class Graphs:
    """What libraries for graphs hand to a model: nodes of several graphs at once."""

    def __init__(self, graphs: int, nodes: int) -> None:
        self.x = torch.randn(nodes, 3)
        self.num_graphs = graphs


class Pair:
    """An object without a word on its size."""

    def __init__(self) -> None:
        self.label, self.x = "pair", torch.randn(6, 3)


def packed(*lengths: int) -> Any:
    sequences = [torch.randn(length, 3) for length in lengths]
    return nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)


def jagged(*lengths: int) -> Tensor:
    sequences = [torch.randn(length, 3) for length in lengths]
    return torch.nested.nested_tensor(sequences, layout=torch.jagged)


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(3, *size) for size in sizes]


EXAMPLES: dict[str, tuple[Any, int]] = {
    "packed sequences": (packed(7, 3, 9, 1, 5), 5),
    "images of different sizes": (images((8, 9), (7, 5), (30, 20), (9, 9)), 4),
    "images of equal sizes": (images((8, 9), (8, 9)), 2),
    "one image in a list": (images((8, 9)), 1),
    "sequences in a list": ([torch.randn(n, 3) for n in (4, 2, 7)], 3),
    "inputs that share a batch": ([torch.randn(6, 3), torch.randn(6, 5)], 6),
    "inputs of several shapes": ([torch.randn(6, 3), torch.randn(6)], 6),
    "graphs": (Graphs(graphs=4, nodes=25), 4),
    "an object with tensors": (Pair(), 6),
    "a nested tensor": (jagged(4, 2, 7), 3),
    "a mapping": ({"ids": torch.zeros(6, 9), "mask": torch.zeros(6, 9)}, 6),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_counted_where_they_can_be_known(name: str) -> None:
    inputs, expected = EXAMPLES[name]
    assert get_batch_size((inputs,)) == expected
    assert get_batch_size((None, inputs, torch.randn(50, 2))) == expected


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4)

    def forward(self, sequences: Any) -> Any:
        return self.gru(sequences)[0]


def test_packed_sequences_count_in_training() -> None:
    model = Recurrent()
    optimizer = SIRFShampoo(model)
    model(packed(7, 3, 9, 1, 5)).data.square().mean().backward()
    optimizer.step()
    assert optimizer.batch_size == 5


def test_a_batch_size_that_the_settings_are_not_made_for_is_told_once() -> None:
    model = Recurrent()
    optimizer = SIRFShampoo(model, expected_batch_size=4)

    def steps(number: int) -> None:
        for _ in range(number):  # time-major: 50 steps of 4 sequences
            optimizer.zero_grad()
            model(torch.randn(50, 4, 3)).square().mean().backward()
            optimizer.step()

    steps(4)
    with pytest.warns(UserWarning, match=r"50 examples are counted.*batch_size=4 to"):
        steps(1)
    steps(10)


def test_a_last_smaller_batch_and_buckets_are_no_mistake() -> None:
    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model, expected_batch_size=8)
    for size in [8, 8, 3, 8, 8, 3, *([7, 9, 8, 10, 6] * 3), 2, 3, 4, 8]:
        optimizer.zero_grad()
        train_on(model, torch.randn(size, 3))
        optimizer.step()
        assert optimizer.batch_size == size


def test_an_integer_that_the_settings_are_not_made_for_is_told() -> None:
    model = nn.Linear(3, 2)
    arguments = recipe(model, batch_size=8)
    optimizer = SIRFShampoo(model, batch_size=4, **arguments)
    train_on(model, torch.randn(4, 3))
    for _ in range(4):
        optimizer.step()
    with pytest.warns(UserWarning, match="4 examples are counted.* are made for 8"):
        optimizer.step()


# ------------------------------------------------------------- transforms, odd inputs


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    return func.jvp(model, (x,), (torch.ones_like(x),))[1]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("beside", [0, 10])
def test_transforms_of_whole_batches_count(beside: int) -> None:
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer = SIRFShampoo(model)
    for transformed in (jacobian, lambda m, x: func.jacrev(m)(x)):
        optimizer.zero_grad()
        loss = transformed(model, torch.randn(64, 2)).square().mean()
        if beside:
            loss = loss + model(torch.randn(beside, 2)).square().mean()
        loss.backward()
        optimizer.step()
        assert optimizer.batch_size == 64 + beside


@pytest.mark.parametrize("beside", [0, 10])
def test_what_vmap_hides_is_not_guessed(beside: int) -> None:
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer = SIRFShampoo(model)
    loss = func.vmap(func.jacrev(model))(torch.randn(64, 2)).square().mean()
    if beside:
        loss = loss + model(torch.randn(beside, 2)).square().mean()
    loss.backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"not within torch\.func\.vmap"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    optimizer = SIRFShampoo(model, batch_size=64)
    optimizer.step()
    assert not all(map(torch.equal, before, model.parameters()))


def no_gradients(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        func.jacrev(model)(x)
        func.vmap(func.jacrev(model))(x)


def of_copies(model: nn.Module, x: Tensor) -> None:
    """Look at gradients of single examples, as torch's tutorial does."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], example: Tensor) -> Tensor:
        return func.functional_call(model, params, (example[None],)).square().mean()

    func.vmap(func.grad(loss), in_dims=(None, 0))(params, x)
    func.grad(loss)(params, x[0])


@pytest.mark.parametrize("look", [no_gradients, of_copies])
def test_transforms_that_reach_no_parameter_do_not_count(look: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer = SIRFShampoo(model)
    look(model, torch.randn(64, 2))
    train_on(model, torch.randn(10, 2))
    optimizer.step()
    assert optimizer.batch_size == 10


class Attributes(dict[str, Tensor]):
    """A dictionary whose entries are attributes; others are errors of its own."""

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


class Batch:
    """Tells no batch size yet, but its attribute is there."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    @property
    def batch_size(self) -> int:
        raise NotImplementedError


@dataclass(init=False)
class Unset:
    """Has a field without a value."""

    width: int


def holding_itself() -> dict[str, Any]:
    memo: dict[str, Any] = {}
    memo["self"] = memo
    return memo


@pytest.mark.parametrize("beside", [None, Unset(), holding_itself()])
@pytest.mark.parametrize("wrap", [lambda x: Attributes(x=x), Batch])
def test_inputs_may_have_attributes_that_fail(wrap: Any, beside: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, batch: Any, beside: Any) -> Tensor:
            return self.layer(batch.x)

    model = Model()
    optimizer = SIRFShampoo(model)
    model(wrap(torch.randn(7, 3)), beside).square().mean().backward()
    optimizer.step()
    assert optimizer.batch_size == 7


def test_a_callable_that_fails_in_evaluation_does_no_harm() -> None:
    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model, batch_size=lambda inputs: inputs[0].absent)
    model.eval()
    model(torch.randn(2, 3))
    model.train()
    with pytest.raises(AttributeError, match="absent"):
        model(torch.randn(2, 3))
    del optimizer
