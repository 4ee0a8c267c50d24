"""The paper: how factors are learned, how gradients are pre-conditioned."""
