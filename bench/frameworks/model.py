"""What the loop asks of a framework, and of a model that it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lplb_triton.bench.frameworks.ranks import Ranks
from lplb_triton.bench.frameworks.sizes import Sizes
from lplb_triton.integrations.layers import LayerBalance

__all__ = ["Framework", "Trained"]


class Trained(ABC):
    """A model with its optimizer.

    Attributes
    ----------
    moe_layers : sequence of torch.nn.Module
        MoE layers in order, whose first argument is the hidden states.
    routers : sequence of torch.nn.Module
        Their routers.
    biases : sequence of torch.Tensor
        ``[experts]`` float32: what each router adds to the scores, sigmoids of the logits, before
        a token chooses its experts.
    """

    moe_layers: Sequence[nn.Module]
    routers: Sequence[nn.Module]
    biases: Sequence[torch.Tensor]

    @property
    @abstractmethod
    def balances(self) -> list[LayerBalance]:
        """The layers' balances, once a batch has run; empty without balancing."""

    @abstractmethod
    def compute_loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Run the forward pass of a batch, and return the mean loss of this rank."""

    @abstractmethod
    def update(self) -> None:
        """Reduce the gradients where the framework does that now, step, and drop the gradients."""

    @abstractmethod
    def count_choices(self, output: Any) -> torch.Tensor:
        """Return the choices by expert ``[experts]`` int64, given what a router returned."""

    def set_biases(self, biases: torch.Tensor) -> None:
        """Set the routers' biases ``[layers, experts]``."""
        with torch.no_grad():
            for mine, given in zip(self.biases, biases, strict=True):
                mine.copy_(given)


class Framework(ABC):
    """Builds models of one framework, all with the same weights.

    Parameters
    ----------
    sizes
        Of the models.
    ranks
        This process among the ranks.
    """

    def __init__(self, sizes: Sizes, ranks: Ranks) -> None:
        self.sizes, self.ranks = sizes, ranks
        self.dtype = torch.bfloat16 if ranks.on_gpu else torch.float32

    @abstractmethod
    def build(self, method: str) -> Trained:
        """Build a model that is balanced by a method, ``even`` as ``lp``; collective."""

    @abstractmethod
    def make_batch(self, number: int) -> torch.Tensor:
        """Make this rank's batch of a step: the same for the same number."""

    def make_generator(self, number: int) -> torch.Generator:
        """Return random numbers of this rank's batch."""
        generator = torch.Generator(self.ranks.device)
        return generator.manual_seed(self.ranks.size * number + self.ranks.rank)

    @abstractmethod
    def close(self) -> None:
        """Let go of what the framework keeps for all models."""
