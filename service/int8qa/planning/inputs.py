"""What a plan is made from: the files named, read, and held to each other.

In: a model repository, results of the benchmarks, a question file. Out: traffic, and
a service with calibrated overheads for each precision. What does not fit together is a
remark, not an error: a plan for another build is better than none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from int8qa.build.triton_config import OPENVINO_INSTANCES
from int8qa.contract import Contract, Precision, load_contract
from int8qa.errors import DataFileError
from int8qa.gateway.line import derive_policy
from int8qa.planning.calibration import Calibration, calibrate
from int8qa.planning.cost_model import (
    CostTable,
    Measured,
    describe_machine,
    read_build_times,
    read_engine_times,
    read_result,
    tabulate_costs,
)
from int8qa.planning.simulation import Service
from int8qa.planning.traffic import Traffic, load_traffic
from int8qa.settings import BatcherSettings

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What to plan for."""

    repository: Path
    rate_qps: float
    bound_ms: float
    """On the 99th percentile of latency."""
    traffic: Path | None = None
    """A SQuAD file; None: the package's own questions."""
    bench: Sequence[Path] = ()
    """Results of ``int8qa bench engine`` and ``int8qa bench gateway``, one of each at
    most."""
    validation: Sequence[Path] = ()
    """Results of ``int8qa bench gateway``, for their Server tests."""
    precisions: Sequence[Precision] = ()
    """Empty: all whose times are known."""
    price_per_hour: float | None = None
    """Of one replica, in any currency."""
    batcher: BatcherSettings = field(default_factory=BatcherSettings)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Subject:
    """One precision to plan for."""

    service: Service
    costs: CostTable
    calibration: Calibration


@dataclass(slots=True)
class PlanInputs:
    """Everything read."""

    options: PlanOptions
    contract: Contract
    traffic: Traffic
    times: Measured
    gateway: Json | None
    """A result of ``int8qa bench gateway`` to calibrate with."""
    validation: list[Json]
    remarks: list[str]

    def choose_precisions(self) -> list[Precision]:
        """Those to plan for.

        Raises:
            DataFileError: the times of one that is asked for are not known.
        """
        known = [p for p in Precision if p in self.times.latency_ms]
        absent = [str(p) for p in self.options.precisions if p not in known]
        if absent or not known:
            raise DataFileError(
                f"{self.times.source} timed {', '.join(map(str, known)) or 'nothing'}"
                + (f", not {', '.join(absent)}" if absent else "")
                + "; time it with `int8qa bench engine`"
            )
        return list(dict.fromkeys(self.options.precisions)) or known

    def build_subject(self, precision: Precision) -> Subject:
        """Costs and overheads of one precision.

        Raises:
            DataFileError: too few shapes were measured.
        """
        costs = tabulate_costs(self.times.latency_ms[precision], self.contract)
        model = self.contract.models.get(precision)
        runs: Sequence[Json] = ()
        traffic, clients = self.traffic, 1
        if self.gateway is not None:
            runs = self.gateway["runs"]
            clients = self.gateway["rules"]["concurrency"]
            traffic = self.find_traffic(self.gateway)
        policy = derive_policy(self.contract, precision, self.options.batcher)
        on_cpu = model is None or model.engine == "openvino"
        instances = OPENVINO_INSTANCES if on_cpu else 1
        calibration = calibrate(
            runs,
            str(precision),
            policy,
            costs.batch_s,
            traffic.questions,
            clients=clients,
            shares_cores=on_cpu,
            instances=instances,
        )
        self.remarks += calibration.remarks
        service = Service(
            policy,
            costs.batch_s,
            calibration.overheads,
            instances,
            calibration.spread,
        )
        return Subject(service, costs, calibration)

    def find_traffic(self, result: Json) -> Traffic:
        """The questions that a gateway was asked."""
        name, count = (result["provenance"][key] for key in ("data", "questions"))
        if name not in (self.traffic.name, "own"):
            self.remarks.append(
                f"a gateway was measured with {name}; the lengths of "
                f"{self.traffic.name} stand for its own, and --traffic {name} would be "
                f"right"
            )
            return self.traffic
        data = self.options.traffic if name == self.traffic.name else None
        return load_traffic(self.options.repository, self.contract, data, limit=count)


def read_inputs(options: PlanOptions) -> PlanInputs:
    """Read all files.

    Raises:
        ContractError: there is no model repository.
        DataFileError: a file cannot be read, or there are two of a kind.
        RepositoryError: no engine result is given, and the build left no times.
    """
    contract = load_contract(options.repository)
    results = [read_result(path) for path in options.bench]
    engines = [result for result in results if result["kind"] == "engine"]
    gateways = [result for result in results if result["kind"] == "gateway"]
    if len(engines) > 1 or len(gateways) > 1:
        raise DataFileError(
            f"--bench was given {len(engines)} results of `int8qa bench engine` and "
            f"{len(gateways)} of `int8qa bench gateway`; allowed is one of each"
        )
    times = (
        read_engine_times(engines[0])
        if engines
        else read_build_times(options.repository)
    )
    validation = [read_result(path, ("gateway",)) for path in options.validation]
    builds = [("engine's times", times.build_id)] + [
        ("gateway's tests", result["gateway"]["build_id"])
        for result in (*gateways, *validation)
    ]
    remarks = [
        f"the {what} are of build {build}, the repository holds {contract.build_id}"
        for what, build in builds
        if build != contract.build_id
    ] + [
        f"the gateway was measured on {machine}, the engines on {times.machine}"
        for machine in dict.fromkeys(map(describe_machine, (*gateways, *validation)))
        if engines and machine != times.machine
    ]
    return PlanInputs(
        options=options,
        contract=contract,
        traffic=load_traffic(options.repository, contract, options.traffic),
        times=times,
        gateway=gateways[0] if gateways else None,
        validation=validation,
        remarks=remarks,
    )
