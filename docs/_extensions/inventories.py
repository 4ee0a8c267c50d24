"""Where the names of torch and Python are explained, without asking the network."""

import zlib
from pathlib import Path

TORCH = "https://docs.pytorch.org/docs/stable/"
PYTHON = "https://docs.python.org/3/"

OF_TORCH = {
    "torch.Tensor": ("class", "tensors.html"),
    "torch.Size": ("class", "size.html"),
    "torch.dtype": ("class", "tensor_attributes.html"),
    "torch.device": ("class", "tensor_attributes.html"),
    "torch.nn.Module": ("class", "generated/torch.nn.Module.html"),
    "torch.nn.Parameter": ("class", "generated/torch.nn.parameter.Parameter.html"),
    "torch.nn.parameter.Parameter": (
        "class",
        "generated/torch.nn.parameter.Parameter.html",
    ),
    "torch.nn.Linear": ("class", "generated/torch.nn.Linear.html"),
    "torch.nn.Embedding": ("class", "generated/torch.nn.Embedding.html"),
    "torch.nn.modules.linear.Linear": ("class", "generated/torch.nn.Linear.html"),
    "torch.nn.modules.module.Module": ("class", "generated/torch.nn.Module.html"),
    "torch.nn.modules.sparse.Embedding": ("class", "generated/torch.nn.Embedding.html"),
    "torch.optim.Optimizer": ("class", "optim.html"),
    "torch.optim.optimizer.Optimizer": ("class", "optim.html"),
    "torch.distributed.distributed_c10d.ProcessGroup": ("class", "distributed.html"),
    "torch.distributed.device_mesh.DeviceMesh": ("class", "distributed.html"),
}
OF_PYTHON = {
    "int": ("class", "library/functions.html"),
    "float": ("class", "library/functions.html"),
    "bool": ("class", "library/functions.html"),
    "object": ("class", "library/functions.html"),
    "type": ("class", "library/functions.html"),
    "str": ("class", "library/stdtypes.html"),
    "dict": ("class", "library/stdtypes.html"),
    "list": ("class", "library/stdtypes.html"),
    "tuple": ("class", "library/stdtypes.html"),
    "slice": ("class", "library/functions.html"),
    "None": ("data", "library/constants.html"),
    "True": ("data", "library/constants.html"),
    "False": ("data", "library/constants.html"),
    "typing.Any": ("data", "library/typing.html"),
    "typing.Literal": ("data", "library/typing.html"),
    "typing.ClassVar": ("data", "library/typing.html"),
    "abc.ABC": ("class", "library/abc.html"),
    "collections.abc.Callable": ("class", "library/collections.abc.html"),
    "collections.abc.Iterable": ("class", "library/collections.abc.html"),
    "collections.abc.Iterator": ("class", "library/collections.abc.html"),
    "collections.abc.Sequence": ("class", "library/collections.abc.html"),
    "ValueError": ("exception", "library/exceptions.html"),
    "MemoryError": ("exception", "library/exceptions.html"),
    "RuntimeError": ("exception", "library/exceptions.html"),
    "NotImplementedError": ("exception", "library/exceptions.html"),
    "KeyError": ("exception", "library/exceptions.html"),
    "TypeError": ("exception", "library/exceptions.html"),
}

Names = dict[str, tuple[str, str]]


def written(folder: Path) -> dict[str, tuple[str, str]]:
    """Write both inventories into a folder; return intersphinx' mapping."""
    folder.mkdir(parents=True, exist_ok=True)
    mapping = {}
    for project, url, names in (
        ("torch", TORCH, OF_TORCH),
        ("python", PYTHON, OF_PYTHON),
    ):
        path = folder / f"{project}.inv"
        path.write_bytes(_inventory(project, names))
        mapping[project] = (url, str(path))
    return mapping


def _inventory(project: str, names: Names) -> bytes:
    """Return names in Sphinx's format, version 2."""
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
    head += "# The remainder of this file is compressed using zlib.\n"
    lines = [f"{n} py:{kind} 1 {page}#$ -\n" for n, (kind, page) in names.items()]
    return head.encode() + zlib.compress("".join(lines).encode())
