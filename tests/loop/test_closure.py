"""A closure is refused as documented, and run where the constructor allows it."""

import pytest
import torch
from torch import Tensor, nn

from sirfshampoo import SIRFShampoo

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def test_a_closure_is_refused_and_the_way_out_is_told() -> None:
    optimizer = SIRFShampoo(nn.Linear(4, 3))
    with pytest.raises(NotImplementedError, match=r"Lightning.*allow_closure=True"):
        optimizer.step(lambda: 0.0)
    assert optimizer.global_step == 0


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_closure_does_what_one_would_do_by_hand(scheduled: bool) -> None:
    found = []
    for closes in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        optimizer = SIRFShampoo(model, lr=0.1, beta2=0.2, allow_closure=True)
        if scheduled:
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

        def closure(
            model: nn.Module = model, optimizer: SIRFShampoo = optimizer
        ) -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = model(X).square().mean()
            loss.backward()
            return loss

        losses = []
        for _ in range(4):
            if closes:
                with torch.no_grad():
                    losses.append(optimizer.step(closure))
            else:
                losses.append(closure())
                assert optimizer.step() is None
            assert optimizer.batch_size == len(X)
            if scheduled:
                schedule.step()
        assert losses[-1] < losses[0]
        parameters = nn.utils.parameters_to_vector(model.parameters())
        found.append(torch.cat([torch.stack(losses).detach(), parameters]))
    assert torch.equal(*found)
