"""Reinforcement learning: a mass on a line is to come to rest at 0.

State: place and speed; the three actions push it left, not at all, or right. A step
costs place² + speed² / 10.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training.parts import Data, Part, split

INTERVAL, PUSH, DISCOUNT, EXPLORES = 0.1, 2.0, 0.95, 0.01
LENGTH, LENGTH_OF_TEST = 40, 80  # of an episode, in steps


class ActorCritic(nn.Module):
    """Chooses actions, and tells what a state will cost."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Linear(2, width), nn.Tanh()), *(nn.Linear(width, width), nn.Tanh())
        )
        self.policy_head, self.value_head = nn.Linear(width, 3), nn.Linear(width, 1)

    def act(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of actions, [..., 3], and expected costs, [...]."""
        hidden = self.body(states)
        return self.policy_head(hidden), self.value_head(hidden).squeeze(-1)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        """Act; out of training, return what episodes from these starts cost a step."""
        return self.act(states) if self.training else self._costs_of_episodes(states)

    def _costs_of_episodes(self, states: Tensor) -> Tensor:
        costs = []
        for _ in range(LENGTH_OF_TEST):
            states, cost = _moved(states, self.act(states)[0].argmax(-1))
            costs.append(cost)
        return torch.stack(costs).mean(0)


def starts() -> Data:
    """Draw places and speeds to start from."""
    generator = torch.Generator().manual_seed(6)
    states = torch.rand(3000, 2, generator=generator) * 2 - 1
    states *= torch.tensor([2.0, 1.0])
    origin = "made: places from -2 to 2, speeds from -1 to 1"
    return split(states, torch.zeros(3000), val=500, test=500, origin=origin)


def objective(model: nn.Module, batch: Part) -> Tensor:
    """Return what episodes cost, and what the critic is wrong by.

    The first has the gradient of the policy, by the likelihood ratio with the critic as
    a baseline.
    """
    with torch.no_grad():
        states, actions, costs = _episodes(model, batch.inputs)
        to_go = torch.zeros_like(costs)
        rest = torch.zeros_like(costs[:, 0])
        for t in reversed(range(costs.shape[1])):
            rest = to_go[:, t] = costs[:, t] + DISCOUNT * rest
    logits, expected = model(states)
    log_p = logits.log_softmax(-1)
    chosen = log_p.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    ratio = (chosen - chosen.detach()).exp()  # 1, but for its gradient
    baseline = expected.detach()
    paid = (to_go - baseline) * ratio + baseline
    entropy = -(log_p.exp() * log_p).sum(-1)
    return paid.mean() + F.mse_loss(expected, to_go) / 2 - EXPLORES * entropy.mean()


def cost(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cost of a step."""
    return outputs.mean()


def _episodes(model: nn.Module, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return states [n, time, 2], actions and costs [n, time]."""
    found = []
    for _ in range(LENGTH):
        logits, _ = model(states)
        actions = torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
        after, costs = _moved(states, actions)
        found.append((states, actions, costs))
        states = after
    all_states, all_actions, all_costs = zip(*found, strict=True)
    return (
        torch.stack(all_states, 1),
        torch.stack(all_actions, 1),
        torch.stack(all_costs, 1),
    )


def _moved(states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Return states after a step, and what it cost."""
    place, speed = states.unbind(-1)
    speed = speed + INTERVAL * PUSH * (actions - 1)
    place = place + INTERVAL * speed
    return torch.stack([place, speed], -1), place.square() + speed.square() / 10
