"""What a plan is locked to: library, CUDA, GPU, driver; and whether it fits here.

In: this machine. Out: an :class:`EngineLock` for the manifest, and a refusal that names
both versions before Triton tries a plan it cannot load. Needs no TensorRT to compare:
NVIDIA's driver library answers for the GPU, the container's variables for the rest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from int8qa.build.engines.tensorrt import import_library
from int8qa.build.engines.tensorrt_options import Flavour, PlanOptions
from int8qa.build.repository import read_manifest
from int8qa.errors import ContractError, MissingDependencyError, RepositoryError

MANIFEST_KEY = "tensorrt"
"""Of the manifest's part about plans; its ``lock`` is an :class:`EngineLock`."""
NGC_RELEASE = "26.10"
"""NGC release of every image, by NVIDIA's numbering that of tritonclient 2.74. That the
image exists, and what TensorRT it has, could not be tried here. One value for builder
and server; images of one month have shipped different TensorRT builds all the same: the
lock, not the month, decides."""
_TENSORRT_VARIABLE = "TRT_VERSION"
_CUDA_VARIABLE = "CUDA_VERSION"
_TRITON_VARIABLE = "NVIDIA_TRITON_SERVER_VERSION"
"""Set in NGC's images: ``10.13.3.9+cuda13.0``, ``13.0.1.012``, ``25.09``."""


@dataclass(frozen=True, slots=True)
class EngineLock:
    """Versions a plan was built with, or a server would run it with; None: unknown."""

    library: str
    """``tensorrt`` or ``tensorrt-rtx``."""
    version: str | None
    cuda: str | None = None
    compute_capabilities: tuple[str, ...] = ()
    """``sm89``; of a plan all it was built for, of a machine all its GPUs."""
    driver: str | None = None
    gpu: str | None = None
    ngc_release: str | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False

    def describe(self) -> dict[str, Any]:
        """As the manifest keeps it."""
        return asdict(self) | {"compute_capabilities": list(self.compute_capabilities)}

    @classmethod
    def from_manifest(cls, entry: Mapping[str, Any]) -> EngineLock:
        """Read back what :meth:`describe` wrote.

        Raises:
            ContractError: it is not that.
        """
        try:
            values = dict(entry)
            Flavour(values["library"])
            values["compute_capabilities"] = tuple(values["compute_capabilities"])
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise ContractError(
                "the manifest does not say which TensorRT its plans are for: rebuild "
                "with `int8qa build`"
            ) from error


def read_lock(
    flavour: Flavour,
    *,
    compute_capabilities: tuple[str, ...] = (),
    version_compatible: bool = False,
    hardware_compatible: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> EngineLock:
    """This machine's versions.

    Args:
        flavour: which library.
        compute_capabilities: of an RTX build; else those of the GPUs here.
        version_compatible: of the build.
        hardware_compatible: of the build.
        environment: variables of the process.
    """
    driver, cuda, gpus = _ask_driver()
    try:
        version: str | None = str(import_library(flavour).__version__)
    except MissingDependencyError:
        # A serving container has the library, but not always its Python package.
        stated = environment.get(_TENSORRT_VARIABLE)
        version = stated if flavour is Flavour.TENSORRT else None
    return EngineLock(
        library=str(flavour),
        version=None if version is None else version.partition("+")[0],
        cuda=environment.get(_CUDA_VARIABLE) or cuda,
        compute_capabilities=compute_capabilities
        or tuple(dict.fromkeys(capability for _, capability in gpus)),
        driver=driver,
        gpu=", ".join(dict.fromkeys(name for name, _ in gpus)) or None,
        ngc_release=environment.get(_TRITON_VARIABLE),
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )


def read_builder_lock(options: PlanOptions) -> EngineLock:
    """What plans built with ``options`` here are locked to."""
    return read_lock(
        options.flavour,
        compute_capabilities=options.compute_capabilities,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
    )


def _ask_driver() -> tuple[str | None, str | None, list[tuple[str, str]]]:
    """Driver, the CUDA it supports, and name and capability of each GPU."""
    try:
        import pynvml
    except ImportError:
        return None, None, []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None, None, []
    try:
        number = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            gpus.append((_text(pynvml.nvmlDeviceGetName(handle)), f"sm{major}{minor}"))
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        return driver, f"{number // 1000}.{number % 1000 // 10}", gpus
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def check_repository(repository: Path) -> EngineLock | None:
    """Hold the plans of a repository to this machine, before Triton loads them.

    Returns:
        The lock of its plans; None of a repository without plans.

    Raises:
        ContractError: the plans cannot load here; names both versions.
        MissingDependencyError: the library or the GPU they need is not here.
    """
    try:
        entry = read_manifest(repository).get(MANIFEST_KEY)
    except RepositoryError:
        return None  # whether anything can be served is for the contract to say
    if entry is None:
        return None
    lock = entry.get("lock") if isinstance(entry, dict) else None
    built = EngineLock.from_manifest(lock or {})
    unknown = check_lock(built, read_lock(Flavour(built.library)))
    if unknown:
        raise MissingDependencyError(
            f"{repository} holds plans of {built.library} {built.version} for "
            f"{', '.join(built.compute_capabilities)}, and this machine's "
            f"{' and '.join(unknown)} cannot be found: {_describe_cure(built)}, or "
            f"serve here with `int8qa build --target openvino`"
        )
    return built


def _describe_cure(built: EngineLock) -> str:
    if built.library == Flavour.RTX:
        return (
            f"pip install tensorrt-rtx=={built.version} nvidia-ml-py cuda-python, on a "
            f"machine with such a GPU"
        )
    return (
        f"start the image that built them ({_describe_image(built)}) with --gpus all "
        f"and the package nvidia-ml-py in it"
    )


def check_lock(built: EngineLock, here: EngineLock) -> list[str]:
    """Hold what would run a plan to what built it.

    Returns:
        What could not be compared, for want of a version on one side.

    Raises:
        ContractError: the plan cannot load here; names both versions.
    """
    if built.library != here.library:
        raise ContractError(
            f"the plans are {built.library}'s, this server has {here.library}: build "
            f"with --target {here.library}, or serve with {built.library}"
        )
    unknown = []
    if built.version is None or here.version is None:
        unknown.append(f"version of {built.library}")
    elif not _version_fits(built, here.version):
        raise ContractError(
            f"the plans were built with {built.library} {built.version}, this server "
            f"has {here.version}, and loads no others: run `int8qa build` in the image "
            f"that serves ({_describe_image(here)}), or serve with the builder's "
            f"({_describe_image(built)})"
        )
    if not built.compute_capabilities or not here.compute_capabilities:
        unknown.append("compute capability")
    else:
        lost = [
            capability
            for capability in here.compute_capabilities
            if not _capability_fits(built, capability)
        ]
        if lost:
            raise ContractError(
                f"the plans were built for {', '.join(built.compute_capabilities)}, "
                f"this server's GPU is {', '.join(lost)}"
                f"{f' ({here.gpu})' if here.gpu else ''}: rebuild on it, or serve on a "
                f"GPU of the builder's kind{f' ({built.gpu})' if built.gpu else ''}"
            )
    return unknown


def _describe_image(lock: EngineLock) -> str:
    return f"NGC {lock.ngc_release}" if lock.ngc_release else "release unknown"


def _version_fits(built: EngineLock, version: str) -> bool:
    """Whether a plan loads in ``version``.

    Exact for ordinary plans. Version-compatible ones load in the same major version
    from their own minor on, and in the next major.

    Source: TensorRT documentation 11, Version Compatibility.
    """
    assert built.version is not None
    if not built.version_compatible:
        return _numbers(built.version) == _numbers(version)
    old, new = _numbers(built.version), _numbers(version)
    return new[0] == old[0] + 1 or (new[0] == old[0] and new >= old)


def _numbers(version: str) -> tuple[int, ...]:
    """Major, minor, patch and build; a missing build counts as 0."""
    found = [int(part) for part in re.findall(r"\d+", version)[:4]]
    return tuple(found + [0] * (4 - len(found)))


def _capability_fits(built: EngineLock, capability: str) -> bool:
    if capability in built.compute_capabilities:
        return True
    number = int(capability.removeprefix("sm"))
    # Compatible from Ampere on: 8.0 and all that came after.
    return built.hardware_compatible and number >= 80
