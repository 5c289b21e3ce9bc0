"""ONNX to a TensorRT plan, by whichever TensorRT is here.

In: a half graph (see half_graph.py), profiles, options. Out: a plan, and a census
of the network it was built from. One seam, :func:`import_library`, hides:

- TensorRT 10 types weakly unless STRONGLY_TYPED is asked for; 11 always types strongly
  and has neither precision flags nor calibrators. None of these is used here.
- TensorRT needs the very GPU it builds for. TensorRT-RTX builds ahead of time on any
  machine, for the compute capabilities it is told, and compiles kernels where it runs.
- TensorRT keeps timings of kernels in a cache. RTX times nothing when it builds, and a
  timing cache would make it look for a GPU: its caches belong to the run time.
- Plans of TensorRT are locked to version and GPU unless flags say otherwise. RTX's run
  on every GPU of their capabilities, and its hardware compatibility is always on.
- Both accept one logger per process: the first. It is made once, and shared.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int8qa.build.engines.tensorrt_census import NetworkCensus, take_network_census
from int8qa.build.engines.tensorrt_options import (
    PLAN_FILENAME,
    Flavour,
    PlanOptions,
    Profile,
)
from int8qa.errors import BuildError, ExportError, MissingDependencyError

if TYPE_CHECKING:
    import onnx

OnStep = Callable[[str, int, int], None]
"""Called with a phase of the builder, steps done and steps in all."""
_ACTIVATION_MEMORY = re.compile(r"Total Activation Memory: (\d+) bytes")


@dataclass(frozen=True, slots=True)
class BuiltPlan:
    """A plan on disk and what went into it."""

    path: Path
    size_bytes: int
    seconds: float
    profiles: tuple[Profile, ...]
    activation_bytes: int | None
    """Memory of one context for activations, as the builder states it."""
    census: NetworkCensus


def import_library(flavour: Flavour) -> Any:
    """The library's Python module.

    Raises:
        MissingDependencyError: it is not here; says what else can be done.
    """
    try:
        library = importlib.import_module(flavour.module_name)
        library.Builder  # noqa: B018 - a stub of the package lacks it
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        raise MissingDependencyError(_MISSING[flavour]) from error
    return library


_MISSING = {
    Flavour.TENSORRT: (
        "--target tensorrt needs the Python package tensorrt 10 or 11 and an NVIDIA "
        "GPU, and finds no such package: run it in NGC's tritonserver image that will "
        "serve, with --gpus all; without a GPU, --target tensorrt-rtx builds the same "
        "graphs ahead of time (pip install tensorrt-rtx), and --target openvino serves "
        "on this CPU now"
    ),
    Flavour.RTX: (
        "--target tensorrt-rtx needs the Python package tensorrt-rtx and finds none: "
        "pip install tensorrt-rtx (no GPU needed to build), or use --target openvino, "
        "which serves on this CPU now"
    ),
}
_NO_GPU = (
    "--target tensorrt finds the TensorRT library but no usable GPU ({reason}): start "
    "the container with --gpus all and a driver for its CUDA, or use --target "
    "tensorrt-rtx, which builds without a GPU, or --target openvino"
)


def check_builder(options: PlanOptions) -> None:
    """Refuse at once what would be refused after minutes of calibration.

    Raises:
        MissingDependencyError: no library, or no GPU for one that needs it.
        BuildError: the library cannot build as asked.
    """
    options.check()
    library = import_library(options.flavour)
    _make_builder(library, _shared_logger(options.flavour))
    _find_capabilities(library, options)


def build_plan(
    model: onnx.ModelProto,
    directory: Path,
    profiles: Sequence[Profile],
    options: PlanOptions,
    on_step: OnStep | None = None,
) -> BuiltPlan:
    """Parse ``model`` and build ``model.plan`` in ``directory``.

    Args:
        model: a half graph (see half_graph.make_half_graph).
        directory: must exist.
        profiles: shapes the engine takes; see :func:`choose_profiles`.
        options: see :class:`PlanOptions`.
        on_step: told of the builder's progress, where the library has a monitor.

    Raises:
        MissingDependencyError: no library, or no GPU for one that needs it.
        ExportError: TensorRT cannot parse or build the graph.
    """
    options.check()
    library = import_library(options.flavour)
    logger = _shared_logger(options.flavour)
    begin = time.monotonic()
    builder = _make_builder(library, logger)
    # The parser owns the weights that the network refers to: keep it.
    network, _parser = _parse(library, logger, builder, model)
    census = take_network_census(library, network)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(
        library.MemoryPoolType.WORKSPACE, options.workspace_bytes
    )
    _add_profiles(builder, config, network, profiles)
    _set_targets(library, config, options)
    if on_step is not None and hasattr(library, "IProgressMonitor"):
        config.progress_monitor = _make_monitor(library, on_step)
    cache = _TimingCache(library, config, options.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(
            f"{options.flavour} cannot build the graph"
            f"{_for_capabilities(options)}: {logger.last_error('no reason given')}"
        )
    cache.save()
    path = directory / PLAN_FILENAME
    path.write_bytes(plan)
    return BuiltPlan(
        path=path,
        size_bytes=path.stat().st_size,
        seconds=time.monotonic() - begin,
        profiles=tuple(profiles),
        activation_bytes=logger.find_activation_bytes(),
        census=census,
    )


def measure_growth(
    model: onnx.ModelProto, options: PlanOptions, *, batch: int = 32, tokens: int = 192
) -> float:
    """Activation memory at twice ``tokens``, over that at ``tokens``: two builds.

    About 2 for an engine whose attention is fused. One that keeps scores [B, heads, S,
    S] in memory needs four times as much for these, and comes out well above.

    Raises:
        ExportError: TensorRT cannot build the graph, or states no memory.
    """
    found = []
    for length in (tokens, 2 * tokens):
        profile = Profile((1, 1), (min(8, batch), length), (batch, length))
        with tempfile.TemporaryDirectory() as scratch:
            plan = build_plan(model, Path(scratch), [profile], options)
        if not plan.activation_bytes:
            raise ExportError(f"{options.flavour} states no activation memory")
        found.append(plan.activation_bytes)
    return found[1] / found[0]


def parse_network(model: onnx.ModelProto, flavour: Flavour) -> NetworkCensus:
    """What the library makes of ``model``, without building it.

    Raises:
        MissingDependencyError: no library, or no GPU for one that needs it.
        ExportError: it cannot parse the graph.
    """
    library = import_library(flavour)
    logger = _shared_logger(flavour)
    builder = _make_builder(library, logger)
    network, _parser = _parse(library, logger, builder, model)
    return take_network_census(library, network)


def _make_builder(library: Any, logger: Any) -> Any:
    logger.clear()
    try:
        return library.Builder(logger)
    except TypeError as error:  # pybind11: the factory returned nothing
        raise MissingDependencyError(
            _NO_GPU.format(reason=logger.last_error("no reason given"))
        ) from error


def _parse(
    library: Any, logger: Any, builder: Any, model: onnx.ModelProto
) -> tuple[Any, Any]:
    """The network, and the parser that made it."""
    flags = library.NetworkDefinitionCreationFlag
    strongly_typed = getattr(flags, "STRONGLY_TYPED", None)
    network = builder.create_network(
        0 if strongly_typed is None else 1 << int(strongly_typed)
    )
    parser = library.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        shown = "; ".join(_describe(error) for error in errors[:3])
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise ExportError(
            f"TensorRT {library.__version__} cannot parse the graph: "
            f"{shown or logger.last_error('no reason given')}{more}"
        )
    return network, parser


def _describe(error: Any) -> str:
    """Node, operator and reason; older parsers know the node's number alone."""
    name = error.node_name() if hasattr(error, "node_name") else ""
    operator = error.node_operator() if hasattr(error, "node_operator") else ""
    where = f"{name or f'node {error.node()}'} ({operator or 'operator unknown'})"
    return f"{where}: {error.desc().strip()}"


def _add_profiles(
    builder: Any, config: Any, network: Any, profiles: Sequence[Profile]
) -> None:
    for profile in profiles:
        entry = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            name = network.get_input(index).name
            entry.set_shape(name, profile.least, profile.tuned, profile.most)
        if config.add_optimization_profile(entry) < 0:
            raise ExportError(f"TensorRT refuses the optimization profile {profile}")


def _set_targets(library: Any, config: Any, options: PlanOptions) -> None:
    capabilities = _find_capabilities(library, options)
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(capability, index)
    if options.version_compatible:
        config.set_flag(library.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = (
            library.HardwareCompatibilityLevel.AMPERE_PLUS
        )


def _find_capabilities(library: Any, options: PlanOptions) -> list[Any]:
    """The library's own names of what is to be built for."""
    found = []
    for capability in options.compute_capabilities:
        known = library.ComputeCapability.__members__
        if capability.upper() not in known:
            choices = [name.lower() for name in known if name.startswith("SM")]
            raise BuildError(
                f"TensorRT-RTX {library.__version__} cannot build for {capability}; "
                f"it can for {', '.join(choices)}"
            )
        found.append(known[capability.upper()])
    return found


def _for_capabilities(options: PlanOptions) -> str:
    names = ", ".join(options.compute_capabilities)
    return f" for {names}" if names else ""


class _TimingCache:
    """Kernel timings of earlier builds, one file per version of the library.

    TensorRT itself holds entries of other GPUs apart, and refuses a foreign file.
    """

    def __init__(self, library: Any, config: Any, folder: Path | None) -> None:
        self._config = config
        self._path = (
            None if folder is None else folder / f"timing-{library.__version__}.cache"
        )
        if self._path is None:
            return
        held = self._path.read_bytes() if self._path.is_file() else b""
        cache = config.create_timing_cache(held)
        if not config.set_timing_cache(cache, ignore_mismatch=False):
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def save(self) -> None:
        """Write what the build added, complete or not at all."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._path.with_suffix(f".{os.getpid()}")
        scratch.write_bytes(self._config.get_timing_cache().serialize())
        scratch.replace(self._path)


def _make_monitor(library: Any, on_step: OnStep) -> Any:
    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._totals: dict[str, int] = {}

        def phase_start(
            self, phase_name: str, parent_phase: str | None, num_steps: int
        ) -> None:
            del parent_phase
            self._totals[phase_name] = num_steps
            on_step(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            on_step(phase_name, step + 1, self._totals.get(phase_name, 0))
            return True  # False would cancel the build

        def phase_finish(self, phase_name: str) -> None:
            total = self._totals.pop(phase_name, 0)
            on_step(phase_name, total, total)

    return Monitor()


@functools.cache
def _shared_logger(flavour: Flavour) -> Any:
    """The process's logger of a library: keeps errors, lets the rest go."""
    return _make_logger(import_library(flavour))


def _make_logger(library: Any) -> Any:
    class Logger(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.memory: list[int] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity <= library.ILogger.Severity.ERROR:
                self.errors.append(msg.strip())
            elif (stated := _ACTIVATION_MEMORY.search(msg)) is not None:
                self.memory.append(int(stated[1]))

        def clear(self) -> None:
            self.errors.clear()
            self.memory.clear()

        def find_activation_bytes(self) -> int | None:
            return max(self.memory, default=None)

        def last_error(self, otherwise: str) -> str:
            return self.errors[-1] if self.errors else otherwise

    return Logger()
