"""A plan goes where it can load; elsewhere both versions are named."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from int8qa.build.engines import tensorrt_lock
from int8qa.build.engines.tensorrt_lock import (
    EngineLock,
    check_lock,
    check_repository,
    read_builder_lock,
    read_lock,
)
from int8qa.build.engines.tensorrt_options import Flavour, PlanOptions
from int8qa.errors import ContractError, MissingDependencyError

BUILT = EngineLock(
    library="tensorrt",
    version="10.13.3.9",
    cuda="13.0.1",
    compute_capabilities=("sm89",),
    driver="580.65.06",
    gpu="NVIDIA L4",
    ngc_release="25.09",
)


def other(**changes: object) -> EngineLock:
    return dataclasses.replace(BUILT, **changes)  # type: ignore[arg-type]


def test_same_machine() -> None:
    """What was built here loads here; a newer driver is no obstacle."""
    assert check_lock(BUILT, other(driver="590.10")) == []


def test_another_tensorrt() -> None:
    """Another build of the same minor version is refused, with both and the images."""
    with pytest.raises(ContractError) as caught:
        check_lock(BUILT, other(version="10.13.2.6", ngc_release="25.08"))
    text = str(caught.value)
    for part in ("10.13.3.9", "10.13.2.6", "NGC 25.08", "NGC 25.09", "int8qa build"):
        assert part in text


def test_another_gpu() -> None:
    """A plan for an L4 is refused on a T4, naming both."""
    with pytest.raises(ContractError, match=r"for sm89, .* sm75 \(Tesla T4\)"):
        check_lock(BUILT, other(compute_capabilities=("sm75",), gpu="Tesla T4"))


def test_another_library() -> None:
    """RTX's plans are not TensorRT's."""
    with pytest.raises(
        ContractError, match=r"the plans are tensorrt's, .* tensorrt-rtx"
    ):
        check_lock(BUILT, other(library="tensorrt-rtx"))


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("10.14.0.1", True),
        ("11.1.0.2", True),
        ("10.12.0.1", False),
        ("12.0.0.1", False),
    ],
)
def test_version_compatible(version: str, fits: bool) -> None:
    """A version-compatible plan loads in later minors and in the next major alone."""
    built = other(version_compatible=True)
    if fits:
        assert check_lock(built, other(version=version)) == []
    else:
        with pytest.raises(ContractError, match="loads no others"):
            check_lock(built, other(version=version))


@pytest.mark.parametrize(("capability", "fits"), [("sm120", True), ("sm75", False)])
def test_hardware_compatible(capability: str, fits: bool) -> None:
    """A hardware-compatible plan runs on Ampere and later alone."""
    built = other(hardware_compatible=True, compute_capabilities=("sm80",))
    here = other(compute_capabilities=(capability,))
    if fits:
        assert check_lock(built, here) == []
    else:
        with pytest.raises(ContractError, match="built for sm80"):
            check_lock(built, here)


def test_unknown_versions() -> None:
    """What one side does not know is said, and not guessed."""
    here = EngineLock(library="tensorrt", version=None)
    assert check_lock(BUILT, here) == ["version of tensorrt", "compute capability"]


def test_round_trip() -> None:
    """The manifest keeps all of it; a foreign entry is an error of ours."""
    assert EngineLock.from_manifest(BUILT.describe()) == BUILT
    with pytest.raises(ContractError, match="does not say which TensorRT"):
        EngineLock.from_manifest({"library": "tensorrt"})


class Nvml:
    """NVIDIA's driver library with two equal GPUs, as far as it is asked."""

    NVMLError = OSError

    def __init__(self, *, works: bool = True) -> None:
        self._works = works
        self.nvmlInit = self._init
        self.nvmlShutdown = lambda: None
        self.nvmlSystemGetCudaDriverVersion_v2 = lambda: 13010
        self.nvmlSystemGetDriverVersion = lambda: b"580.65.06"
        self.nvmlDeviceGetCount = lambda: 2
        self.nvmlDeviceGetHandleByIndex = lambda index: index
        self.nvmlDeviceGetCudaComputeCapability = lambda _: (8, 9)
        self.nvmlDeviceGetName = lambda _: "NVIDIA L4"

    def _init(self) -> None:
        if not self._works:
            raise OSError("no driver")


def test_reading_a_gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU and driver come from the driver, TensorRT and release from the container."""
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    monkeypatch.setattr(tensorrt_lock, "import_library", _missing)
    lock = read_lock(
        Flavour.TENSORRT,
        environment={
            "TRT_VERSION": "10.13.3.9+cuda13.0",
            "CUDA_VERSION": "13.0.1",
            "NVIDIA_TRITON_SERVER_VERSION": "25.09",
        },
    )
    assert lock == BUILT


def test_reading_a_machine_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a driver an RTX build still knows its library and what it builds for."""
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(works=False))
    library = SimpleNamespace(__version__="1.7.1.116")
    monkeypatch.setattr(tensorrt_lock, "import_library", lambda _: library)
    lock = read_lock(Flavour.RTX, compute_capabilities=("sm75",), environment={})
    assert lock == EngineLock(
        library="tensorrt-rtx", version="1.7.1.116", compute_capabilities=("sm75",)
    )


def _missing(flavour: Flavour) -> None:
    raise MissingDependencyError(str(flavour))


def write_manifest(repository: Path, lock: object) -> None:
    manifest = {"tensorrt": lock if lock is None else {"lock": lock}}
    (repository / "manifest.json").write_text(json.dumps(manifest))


def serve_on(monkeypatch: pytest.MonkeyPatch, lock: EngineLock) -> None:
    """This machine becomes another."""
    monkeypatch.setattr(tensorrt_lock, "read_lock", lambda flavour: lock)


def test_repository_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Plans that can be loaded are told; a repository without plans, or none, passes."""
    serve_on(monkeypatch, BUILT)
    assert check_repository(tmp_path) is None
    write_manifest(tmp_path, None)
    assert check_repository(tmp_path) is None
    write_manifest(tmp_path, BUILT.describe())
    assert check_repository(tmp_path) == BUILT


def test_repository_for_another_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Refused with both versions, before Triton tries."""
    serve_on(monkeypatch, other(version="11.1.0.2"))
    write_manifest(tmp_path, BUILT.describe())
    with pytest.raises(
        ContractError, match=r"10\.13\.3\.9, this server has 11\.1\.0\.2"
    ):
        check_repository(tmp_path)


@pytest.mark.parametrize("lock", [{}, {"library": "none"}, "tensorrt", ["lock"]])
def test_repository_of_a_damaged_manifest(tmp_path: Path, lock: object) -> None:
    """A lock that is none does not let plans through."""
    write_manifest(tmp_path, lock)
    with pytest.raises(ContractError, match="does not say which TensorRT"):
        check_repository(tmp_path)


@pytest.mark.parametrize(
    ("library", "cure"),
    [
        ("tensorrt", r"start the image that built them \(NGC 25\.09\)"),
        ("tensorrt-rtx", r"pip install tensorrt-rtx==10\.13\.3\.9"),
    ],
)
def test_repository_without_its_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: str, cure: str
) -> None:
    """No library and no GPU: what the plans need, how to get it, what works here."""
    serve_on(monkeypatch, EngineLock(library, None))
    write_manifest(tmp_path, other(library=library).describe())
    with pytest.raises(MissingDependencyError, match=cure) as caught:
        check_repository(tmp_path)
    text = str(caught.value)
    assert f"plans of {library} 10.13.3.9 for sm89" in text
    assert f"version of {library} and compute capability cannot be found" in text
    assert "--target openvino" in text
    assert "\n" not in text


def test_lock_of_a_build() -> None:
    """It says what was asked for, not what this machine has."""
    options = PlanOptions(Flavour.RTX, ("sm75", "sm80"))
    assert read_builder_lock(options).compute_capabilities == ("sm75", "sm80")
    flags = PlanOptions(version_compatible=True, hardware_compatible=True)
    lock = read_builder_lock(flags)
    assert (lock.version_compatible, lock.hardware_compatible) == (True, True)
