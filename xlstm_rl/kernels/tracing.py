"""Whether operations are recorded or transformed now, where values cannot be asked for."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling

# Looked up once: acting asks them at every step of every block.
_tracing_state = torch._C._get_tracing_state
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack


def traced() -> bool:
    """Whether operations are compiled, traced, transformed by `torch.func` or seen by a dispatch mode.

    A trace would keep the answer of one call for all, and transforms do not let values be asked for.
    """
    # first, as what the others ask is nothing that `torch.compile` can trace
    return is_compiling() or _tracing_state() is not None or _transforms_active() or _dispatch_modes() > 0


def differentiated_forwards() -> bool:
    """Whether forward-mode derivatives are taken."""
    return forward_ad._current_level >= 0


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is of no class of its own, which could make something else of operations on it."""
    return type(tensor) is Tensor or type(tensor) is nn.Parameter


def transformed() -> bool:
    """Whether writing in place and backward passes written by hand are no good."""
    return traced() or differentiated_forwards()
