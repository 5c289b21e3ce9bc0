"""The Triton child process of `int8qa up`: find, start, watch, stop.

In: a model repository and the embedded settings. Out: a ready gRPC address on
loopback that survives crashes of the server behind it. Refuses to know the
gateway, the build stage and what the models compute. Reading order: `locate`,
`launch`, `log_lines`, `guard`, `supervisor`.
"""

from __future__ import annotations

from int8qa.embedded.locate import TritonInstallation, locate_triton
from int8qa.embedded.supervisor import TritonState, TritonSupervisor

__all__ = ["TritonInstallation", "TritonState", "TritonSupervisor", "locate_triton"]
