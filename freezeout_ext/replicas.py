"""nn.DataParallel's replicas of a module whose methods were replaced on the instance.

A replica copies the instance's attributes, so that a method replaced there would go on working on the original, with
its weights and on its device.
"""

from functools import partial

from torch import nn

REPLACED = ("forward", "train")


def follow_replicas(module: nn.Module) -> None:
    """Binds the methods that this package replaced on the instance to each replica; keep while there are any."""
    # A partial of a plain function: pickles, and follows a deepcopy of the model.
    module._replicate_for_data_parallel = partial(_replicate, module)


def leave_replicas(module: nn.Module) -> None:
    """To be called once a method was given back: the last one takes this along."""
    if not any(name in module.__dict__ for name in REPLACED):
        module.__dict__.pop("_replicate_for_data_parallel", None)


def _replicate(module: nn.Module) -> nn.Module:
    replica = type(module)._replicate_for_data_parallel(module)
    del replica._replicate_for_data_parallel
    for name in REPLACED:
        method = replica.__dict__.get(name)
        if hasattr(method, "for_replica"):
            method.for_replica(replica)
        elif isinstance(method, partial) and method.args and method.args[0] is module:
            replica.__dict__[name] = partial(method.func, replica, *method.args[1:], **method.keywords)
    return replica
