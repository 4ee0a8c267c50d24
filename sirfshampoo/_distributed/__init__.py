"""The only room that knows `torch.distributed`: DTensor, groups, collectives."""

from sirfshampoo._distributed.agreement import Ranks
from sirfshampoo._distributed.exchange import Exchange, check_sharing
from sirfshampoo._distributed.groups import is_initialized, refuse_trainer
from sirfshampoo._distributed.shards import (
    distributed_like,
    fill,
    is_dtensor,
    local,
    local_like,
    placement,
    shard_rows,
    sum_over_shards,
    whole,
    whole_rows,
    whole_stack,
)

__all__ = [
    "Exchange",
    "Ranks",
    "check_sharing",
    "distributed_like",
    "fill",
    "is_dtensor",
    "is_initialized",
    "local",
    "local_like",
    "placement",
    "refuse_trainer",
    "shard_rows",
    "sum_over_shards",
    "whole",
    "whole_rows",
    "whole_stack",
]
