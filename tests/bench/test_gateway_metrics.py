"""What two readings of the gateway's own metrics say of the time between."""

from __future__ import annotations

import pytest

from int8qa.bench.gateway_metrics import measure_use
from int8qa.contract import Precision
from int8qa.gateway.telemetry import RequestRecord, StageSeconds, Telemetry
from int8qa.reader.tokenizer import ReaderTokenizer
from tests.gateway.fakes import TOKENIZER_JSON, build_contract


@pytest.fixture
def telemetry() -> Telemetry:
    """The gateway's own, so that its names are the ones that are read."""
    contract = build_contract(ReaderTokenizer.from_file(TOKENIZER_JSON))
    return Telemetry(contract)


def read(telemetry: Telemetry) -> str:
    return telemetry.render()[0].decode()


def serve(telemetry: Telemetry, precision: Precision, inference_s: float) -> None:
    stages = StageSeconds(0.001, 0.002, inference_s, 0.0005)
    telemetry.observe_stages(precision, stages)
    record = RequestRecord("r", "POST", "/v1/answer", str(precision))
    telemetry.observe_request(record, stages.total + 0.0015)


def test_only_what_lies_between(telemetry: Telemetry) -> None:
    """Means, batches, fill and padding of one precision, from differences alone."""
    int8, fp16 = Precision.INT8, Precision.FP16
    serve(telemetry, int8, 9.0)
    telemetry.on_batch(int8, 128, 10_000, 10_000)
    before = read(telemetry)
    for inference_s in (0.010, 0.020):
        serve(telemetry, int8, inference_s)
    serve(telemetry, fp16, 5.0)
    telemetry.on_batch(int8, 1, 100, 10)
    telemetry.on_batch(int8, 7, 300, 30)
    telemetry.on_batch(int8, 8, 600, 60)
    telemetry.on_batch(fp16, 64, 9000, 9000)
    use = measure_use(before, read(telemetry), "int8")
    assert use is not None
    assert use.requests == 2
    assert use.stages_ms == {
        "tokenize": 1.0,
        "queue": 2.0,
        "inference": 15.0,
        "decode": 0.5,
    }
    assert use.request_ms == 20.0
    assert use.edge_ms == pytest.approx(1.5)
    assert use.batches == 3
    assert use.batch_windows == pytest.approx(16 / 3, abs=1e-3)
    assert use.fill == {"1": 1, "8": 2}
    assert use.padding_share == 0.1
    assert use.cpu_ms is not None
    assert use.cpu_ms >= 0
    assert use.replays == 0


def test_nothing_to_read(telemetry: Telemetry) -> None:
    """No metrics, or no request between: nothing is said, rather than zeros."""
    text = read(telemetry)
    assert measure_use(None, text, "int8") is None
    assert measure_use(text, None, "int8") is None
    assert measure_use(text, text, "int8") is None
