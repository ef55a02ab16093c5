"""Streams for CUDA graphs that live long."""

import weakref

import torch

_idle: dict[int, list[torch.cuda.Stream]] = {}


def own_stream(owner: object, device: int) -> torch.cuda.Stream:
    """A stream for the captures of `owner` alone, as long as it lives.

    From torch 2.12 on, a graph that is destroyed takes cuBLAS's workspace of its stream along, which other graphs that
    were captured there still use: https://github.com/pytorch/pytorch/issues/193402. Streams are used again, since torch
    has 32 and then deals out the same ones.
    """
    idle = _idle.setdefault(device, [])
    stream = idle.pop() if idle else torch.cuda.Stream(device)
    weakref.finalize(owner, idle.append, stream)
    return stream
