"""Triton's own lines, as version 2.51 wrote them."""

from __future__ import annotations

import logging

import pytest

from int8qa.embedded.log_lines import LogLine, find_failure, parse_log_line

NO_GPU = "CudaDriverHelper has not been initialized."
LOAD_FAILURE = (
    "E1123 01:52:10.196426 5983 model_lifecycle.cc:642] \"failed to load 'oops' "
    "version 1: Internal: RuntimeError: engine file is missing: model.xml\\n\\nAt:\\n  "
    '/repository/oops/1/model.py(6): initialize\\n"'
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'I1123 01:51:28.542254 5654 model_lifecycle.cc:472] "loading: echo:1"',
            LogLine(logging.INFO, "model_lifecycle.cc:472", "loading: echo:1"),
        ),
        (
            'W1123 01:51:29.976022 5654 metrics.cc:798] "DCGM unable to start"\n',
            LogLine(logging.WARNING, "metrics.cc:798", "DCGM unable to start"),
        ),
        (
            "E1123 01:52:12.378110597    6043 chttp2_server.cc:1060]       UNKNOWN:No",
            LogLine(logging.ERROR, "chttp2_server.cc:1060", "UNKNOWN:No"),
        ),
        (
            f'E1123 01:51:28.540562 5654 server.cc:241] "{NO_GPU}"',
            LogLine(logging.DEBUG, "server.cc:241", NO_GPU),
        ),
        (
            "I1123 01:51:29.972253 5654 server.cc:604] ",
            LogLine(logging.DEBUG, "server.cc:604", ""),
        ),
        ("+-------+---------+", LogLine(logging.DEBUG, "", "+-------+---------+")),
        ("| echo  | 1       |", LogLine(logging.DEBUG, "", "| echo  | 1       |")),
        ("", LogLine(logging.DEBUG, "", "")),
        (
            "error: creating server: Internal - failed to load all models",
            LogLine(
                logging.ERROR,
                "",
                "error: creating server: Internal - failed to load all models",
            ),
        ),
        ("printed by a model", LogLine(logging.INFO, "", "printed by a model")),
        (
            'I1123 01:51:28.542254 5654 model.py:6] "unfinished \\"',
            LogLine(logging.INFO, "model.py:6", "unfinished \\"),
        ),
    ],
)
def test_line_becomes_level_source_and_message(text: str, expected: LogLine) -> None:
    """Timestamps and quotes go, banners and known noise sink to debug."""
    assert parse_log_line(text) == expected


def test_message_is_one_line() -> None:
    """A traceback inside a message is folded."""
    assert "\n" not in parse_log_line(LOAD_FAILURE).message


def test_failure_names_the_model_and_its_reason() -> None:
    """A load failure is told before the errors that follow from it."""
    lines = [
        parse_log_line(LOAD_FAILURE),
        parse_log_line("error: creating server: Internal - failed to load all models"),
    ]

    assert find_failure(lines) == (
        "model oops does not load: Internal: RuntimeError: engine file is missing: "
        "model.xml At: /repository/oops/1/model.py(6): initialize"
    )


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["one", "error: two", "three"], "error: two"),
        (["one", "two", "+--+"], "one; two"),
        (["+--+", ""], "it wrote nothing"),
    ],
)
def test_failure_falls_back_to_the_last_lines(texts: list[str], reason: str) -> None:
    """Errors come before plain lines, and silence is called silence."""
    assert find_failure(map(parse_log_line, texts)) == reason
