"""The frozen prefix: the forward of the frozen layers, without a graph and as fast as its mode allows.

`Prefix` is used by FreezeOut. watch.py sees one real forward. chain.py runs modules as one engine. guard.py compares at
each call what the modules read, which reads.py found in their code. trace.py, lower.py and simplify.py write a Program.
engine.py runs the Program by the ops of cpu.py or cuda.py. build.py chooses the engine. judge.py says whether the
engine is right, and faster.
"""

from .build import MODES
from .prefix import SAME_MODULES, Prefix
from .report import PrefixReport

__all__ = ["MODES", "SAME_MODULES", "Prefix", "PrefixReport"]
