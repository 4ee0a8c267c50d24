"""Rules that say which parameters share a pre-conditioner and how they are joined."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Size, Tensor, cat
from torch.nn import Embedding, Linear, Module, Parameter

__all__ = [
    "FlattenAndConcatenate",
    "FlattenEmbedding",
    "FlattenKernel",
    "LinearWeightBias",
    "PerParameter",
    "PreconditionerGroup",
]


def _squeeze(tensor: Tensor) -> Tensor:
    """Drop axes of size 1, but keep at least one axis."""
    squeezed = tensor.squeeze()
    return squeezed.unsqueeze(0) if squeezed.ndim == 0 else squeezed


class PreconditionerGroup(ABC):
    """A rule that treats several parameters as one tensor with one pre-conditioner.

    To group parameters in your own way, subclass this and pass an instance in the
    optimizer's ``combine_params``. A rule must be linear and only rearrange entries:
    `ungroup` undoes `group`.

    Attributes:
        NEEDS_MODEL: Whether `identify` looks at more of a model than its parameters.
            Such a rule cannot serve an optimizer that was given parameters alone.

    Example:
        >>> class Kernels(PerParameter):  # a matrix for each convolution
        ...     def group(self, tensors):
        ...         return tensors[0].flatten(1) if tensors[0].ndim > 2 else tensors[0]
        >>> model = torch.nn.Conv2d(3, 8, 5)
        >>> optimizer = SIRFShampoo(model, combine_params=(Kernels(),))
        >>> [K.dim for K in optimizer.preconditioner[0]]
        [8, 75]
    """

    NEEDS_MODEL: bool = True

    @abstractmethod
    def identify(self, model: Module) -> list[list[Parameter]]:
        """Find the parameters of a neural network that this rule treats jointly.

        Args:
            model: The neural network.

        Returns:
            One list of parameters for each pre-conditioner.

        Raises:
            NotImplementedError: If a subclass does not implement it.
        """
        raise NotImplementedError("A child class must implement 'identify'.")

    @abstractmethod
    def group(self, tensors: list[Tensor]) -> Tensor:
        """Join tensors, one for each parameter, into the pre-conditioned tensor.

        Args:
            tensors: The tensors to join, in the order of the parameters that
                `identify` lists.

        Returns:
            The joint tensor with at least one axis. Each axis gets a Kronecker
            factor, so axes of size 1 should be squeezed away.

        Raises:
            NotImplementedError: If a subclass does not implement it.
        """
        raise NotImplementedError("A child class must implement 'group'.")

    @abstractmethod
    def ungroup(
        self, grouped_tensor: Tensor, tensor_shapes: list[Size]
    ) -> list[Tensor]:
        """Split a joint tensor; undoes `group`.

        Args:
            grouped_tensor: The joint tensor.
            tensor_shapes: The shapes of the tensors to split it into.

        Returns:
            The tensors, of the given shapes.

        Raises:
            NotImplementedError: If a subclass does not implement it.
        """
        raise NotImplementedError("A child class must implement 'ungroup'.")


class PerParameter(PreconditionerGroup):
    """Give each parameter a pre-conditioner of its own.

    Example:
        >>> weight = torch.nn.Linear(3, 4).weight
        >>> PerParameter().group([weight]).shape
        torch.Size([4, 3])
    """

    NEEDS_MODEL = False

    def identify(self, model: Module) -> list[list[Parameter]]:
        """List every parameter of the model by itself.

        Args:
            model: The neural network.

        Returns:
            One list with a single entry for each parameter.
        """
        return [[p] for p in model.parameters()]

    def group(self, tensors: list[Tensor]) -> Tensor:
        """Squeeze the axes of size 1 of a single tensor; a scalar gets one axis.

        Args:
            tensors: A list with one tensor.

        Returns:
            A view of the tensor without axes of size 1.
        """
        (tensor,) = tensors
        return _squeeze(tensor)

    def ungroup(
        self, grouped_tensor: Tensor, tensor_shapes: list[Size]
    ) -> list[Tensor]:
        """Bring back the axes of size 1.

        Args:
            grouped_tensor: The squeezed tensor.
            tensor_shapes: A list with the shape of the one tensor.

        Returns:
            A list with the one tensor.
        """
        (shape,) = tensor_shapes
        return [grouped_tensor.reshape(shape)]


class FlattenKernel(PerParameter):
    """Give each parameter a pre-conditioner of its own, with one for a kernel's pixels.

    The weight of a convolution, ``[out, in, height, width]``, becomes a tensor of three
    axes, ``[out, in, height · width]``: fewer, less tiny factors than with one for each
    axis. Others are as with `PerParameter`.

    Example:
        >>> weight = torch.nn.Conv2d(3, 8, 5).weight
        >>> FlattenKernel().group([weight]).shape
        torch.Size([8, 3, 25])
    """

    def group(self, tensors: list[Tensor]) -> Tensor:
        """Join all axes from the third on; squeeze axes of size 1.

        Args:
            tensors: A list with one tensor.

        Returns:
            The tensor with three axes at most, without axes of size 1.
        """
        (tensor,) = tensors
        return _squeeze(tensor.flatten(2) if tensor.ndim > 3 else tensor)


class LinearWeightBias(PreconditionerGroup):
    """Treat the weight and the bias of a linear layer as one matrix [W b].

    Layers without a bias are left to the next rule.

    Attributes:
        LINEAR_CLS: The classes of layers that count as linear. Extend it in a
            subclass for layers of your own that have a ``weight`` of shape
            ``[out, in]`` and a ``bias`` of shape ``[out]``.

    Example:
        >>> layer = torch.nn.Linear(3, 4)
        >>> LinearWeightBias().group([layer.weight, layer.bias]).shape
        torch.Size([4, 4])
    """

    LINEAR_CLS: tuple[type[Module], ...] = (Linear,)

    def identify(self, model: Module) -> list[list[Parameter]]:
        """List weight and bias of every linear layer that has a bias.

        Args:
            model: The neural network.

        Returns:
            One list, weight first, for each such layer.
        """
        layers = [m for m in model.modules() if isinstance(m, self.LINEAR_CLS)]
        # not as attributes, which a parametrized layer computes anew
        own = [layer._parameters for layer in layers]
        pairs = [(params.get("weight"), params.get("bias")) for params in own]
        return [
            [weight, bias]
            for weight, bias in pairs
            if weight is not None and bias is not None
        ]

    def group(self, tensors: list[Tensor]) -> Tensor:
        """Append the bias to the weight as last column; squeeze axes of size 1.

        Args:
            tensors: Weight ``[out, in]`` and bias ``[out]``.

        Returns:
            The matrix ``[out, in + 1]``, without axes of size 1.
        """
        weight, bias = tensors
        return _squeeze(cat([weight, bias.unsqueeze(-1)], dim=-1))

    def ungroup(
        self, grouped_tensor: Tensor, tensor_shapes: list[Size]
    ) -> list[Tensor]:
        """Split the matrix into weight and bias.

        Args:
            grouped_tensor: The joint matrix.
            tensor_shapes: The shapes of weight and bias.

        Returns:
            Weight and bias.
        """
        (out_features, in_features), _ = tensor_shapes
        matrix = grouped_tensor.reshape(out_features, in_features + 1)
        return [matrix[:, :in_features], matrix[:, in_features]]


class FlattenAndConcatenate(PreconditionerGroup):
    """Treat several parameters as one long vector; base of rules that do so."""

    def group(self, tensors: list[Tensor]) -> Tensor:
        """Flatten the tensors and join them end to end.

        Args:
            tensors: Tensors of any shapes.

        Returns:
            A vector.
        """
        flat = [tensor.flatten() for tensor in tensors]
        return flat[0] if len(flat) == 1 else cat(flat)

    def ungroup(
        self, grouped_tensor: Tensor, tensor_shapes: list[Size]
    ) -> list[Tensor]:
        """Cut the vector into tensors.

        Args:
            grouped_tensor: The vector.
            tensor_shapes: The shapes of the tensors.

        Returns:
            The tensors.
        """
        parts = grouped_tensor.split([shape.numel() for shape in tensor_shapes])
        return [p.reshape(s) for p, s in zip(parts, tensor_shapes, strict=True)]


class FlattenEmbedding(FlattenAndConcatenate):
    """Treat the weight of an embedding layer as one long vector.

    Meant for structures whose cost is linear in the axis, such as ``'diagonal'``: a
    dense factor of a flattened embedding would be enormous.

    Attributes:
        EMBEDDING_CLS: The classes of layers that count as embeddings. Extend it in a
            subclass for layers of your own that have a ``weight``.

    Example:
        >>> layer = torch.nn.Embedding(100, 8)
        >>> FlattenEmbedding().group([layer.weight]).shape
        torch.Size([800])
    """

    EMBEDDING_CLS: tuple[type[Module], ...] = (Embedding,)

    def identify(self, model: Module) -> list[list[Parameter]]:
        """List the weight of every embedding layer.

        Args:
            model: The neural network.

        Returns:
            One list with a single entry for each embedding layer.
        """
        layers = [m for m in model.modules() if isinstance(m, self.EMBEDDING_CLS)]
        weights = [layer._parameters.get("weight") for layer in layers]
        return [[weight] for weight in weights if weight is not None]
