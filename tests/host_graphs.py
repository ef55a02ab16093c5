"""CUDA graphs of whole steps without a device: what GraphedStep does between its captures is tested with these.

Of the memory that a graph reads and of what a capture refuses, the simulated CUDA device says more.
"""

from unittest import mock

from freezeout_ext import GraphedStep, graphed


class HostGraphs:
    """Records a step without running it; a replay runs it, into the same result tensors.

    Attributes:
        ran: how many steps ran eagerly.
    """

    def __init__(self):
        self.ran = 0

    def run(self, step):
        self.ran += 1
        return step()

    def capture(self, step, first):
        result = []

        def replay():
            new = step()
            if not result:
                result.extend(new)
            for old, value in zip(result, new, strict=True):
                old.copy_(value)
            return tuple(result)

        return replay


def graphed_step(*args, graphs=None, **options):
    """GraphedStep; what captures is `graphs` in place of CUDA graphs, where they are given."""
    with mock.patch.object(graphed, "_graphs_of", (lambda device: graphs) if graphs else graphed._graphs_of):
        return GraphedStep(*args, **options)
