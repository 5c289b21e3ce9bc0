"""A checkpoint with its questions: which are used, how they are cut, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from int8qa.build import subject as subject_module
from int8qa.build.accuracy import EncodedQuestion
from int8qa.build.checkpoint import CheckpointFiles, load_checkpoint, resolve_checkpoint
from int8qa.build.subject import (
    CALIBRATION_WINDOWS,
    EVALUATION_BATCH,
    QuestionSources,
    Subject,
    data_name,
    load_subject,
    questions_file,
    spread_evenly,
)
from int8qa.contract import ATTENTION_MASK, INPUT_IDS
from int8qa.errors import CheckpointError, DataFileError
from int8qa.reader.squad import load_questions
from tests.build.tiny import CALIBRATION, EVALUATION, POSITIONS, write_squad


@pytest.fixture(scope="module")
def files(tiny_checkpoints: dict[str, Path]) -> CheckpointFiles:
    return resolve_checkpoint(str(tiny_checkpoints["bert"]))


@pytest.fixture(scope="module")
def loaded(
    files: CheckpointFiles,
    question_files: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Subject:
    """The tiny BERT with all of its questions."""
    path = tmp_path_factory.mktemp("subject") / "tokenizer.json"
    return load_subject(files, QuestionSources(*question_files), path)


def ids(encoded: list[EncodedQuestion]) -> list[str]:
    return [item.question.id for item in encoded]


def test_subject(loaded: Subject, question_files: tuple[Path, Path]) -> None:
    """Every question, in the file's order; buckets up to what the model reads."""
    calibration, evaluation = question_files
    assert ids(loaded.calibration) == [q.id for q in load_questions(calibration)]
    assert loaded.questions == load_questions(evaluation)
    assert loaded.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert loaded.buckets == tuple(range(16, POSITIONS + 1, 16))
    assert loaded.max_window_tokens == POSITIONS
    windows = [w for item in loaded.calibration for w in item.windows]
    assert loaded.calibration_windows == windows


def test_tokenizer_is_written(
    files: CheckpointFiles, question_files: tuple[Path, Path], tmp_path: Path
) -> None:
    """The file is the one the questions were split with."""
    path = tmp_path / "tokenizer.json"
    loaded = load_subject(files, QuestionSources(*question_files), path)
    assert path.read_bytes() == loaded.checkpoint.tokenizer_json


def test_model_without_token_types(
    tiny_checkpoints: dict[str, Path],
    question_files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    """DistilBERT takes two inputs."""
    files = resolve_checkpoint(str(tiny_checkpoints["distilbert"]))
    loaded = load_subject(files, QuestionSources(*question_files), tmp_path / "t.json")
    assert loaded.inputs == ("input_ids", "attention_mask")


def write_many(path: Path, count: int) -> Path:
    """``count`` questions on one paragraph, numbered by their answers."""
    context = " ".join(f"Pier {n} is open." for n in range(count))
    pairs = tuple((f"Which is number {n}?", f"Pier {n}") for n in range(count))
    return write_squad(path, ((context, pairs),))


def test_limits_spread_evenly(files: CheckpointFiles, tmp_path: Path) -> None:
    """Each set by its own limit, over its whole length."""
    calibration = write_many(tmp_path / "calibration.json", 8)
    evaluation = write_squad(tmp_path / "evaluation.json", EVALUATION)
    loaded = load_subject(
        files,
        QuestionSources(calibration, evaluation, 3, 1),
        tmp_path / "tokenizer.json",
    )
    assert ids(loaded.calibration) == [f"calibration-0-{n}" for n in (0, 2, 5)]
    assert ids(loaded.evaluation) == ["evaluation-0-0"]


@given(size=st.integers(0, 300), limit=st.none() | st.integers(1, 400))
def test_spread(size: int, limit: int | None) -> None:
    """In order, from the first on, at distances that differ by one at most."""
    found = spread_evenly(range(size), limit)
    assert len(found) == (size if limit is None else min(size, limit))
    assert found[:1] == list(range(size))[:1]
    gaps = np.diff([*found, size])
    assert not len(gaps) or 1 <= gaps.min() <= gaps.max() <= gaps.min() + 1


@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=200))
def test_calibration_windows(counts: list[int]) -> None:
    """At most so many, evenly spaced, and never fewer than half of what is allowed."""
    numbers = iter(range(sum(counts)))
    encoded: Any = [
        EncodedQuestion(None, [next(numbers) for _ in range(count)])  # type: ignore[arg-type,misc]
        for count in counts
    ]
    nothing: Any = None
    subject = Subject(nothing, nothing, nothing, (), (32,), encoded, [])
    found: list[Any] = subject.calibration_windows
    assert min(sum(counts), CALIBRATION_WINDOWS // 2) <= len(found)
    assert len(found) <= CALIBRATION_WINDOWS
    assert found[0] == 0
    assert len(set(np.diff(found))) <= 1


def test_shared_questions(files: CheckpointFiles, tmp_path: Path) -> None:
    """Questions in both sets are counted and refused, whatever their ids."""
    sources = QuestionSources(
        write_squad(tmp_path / "a.json", CALIBRATION),
        write_squad(tmp_path / "b.json", (*EVALUATION, CALIBRATION[0])),
    )
    with pytest.raises(DataFileError, match="2 questions are in both") as caught:
        load_subject(files, sources, tmp_path / "tokenizer.json")
    # The message is not the place for what users ask.
    assert all(q not in str(caught.value) for q, _ in CALIBRATION[0][1])


def test_same_question_of_another_context_is_another(
    files: CheckpointFiles, tmp_path: Path
) -> None:
    """Only question and context together make a question known."""
    context, ((question, answer), *_) = CALIBRATION[0]
    other = f"{context} So they say."
    sources = QuestionSources(
        write_squad(tmp_path / "a.json", CALIBRATION),
        write_squad(tmp_path / "b.json", ((other, ((question, answer),)),)),
    )
    loaded = load_subject(files, sources, tmp_path / "tokenizer.json")
    assert len(loaded.evaluation) == 1


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_missing_file(
    question_files: tuple[Path, Path], tmp_path: Path, split: str
) -> None:
    """Both paths are looked at, and the message names the one at fault."""
    sources = QuestionSources(*question_files)
    sources.check()
    for path in (tmp_path / "none.json", tmp_path):
        broken = dataclasses.replace(sources, **{split: path})  # type: ignore[arg-type]
        with pytest.raises(DataFileError, match=f"no such file: {path}"):
            broken.check()


def test_impossible_questions_are_left_out(
    files: CheckpointFiles, question_files: tuple[Path, Path], tmp_path: Path
) -> None:
    """Some are skipped; a file of nothing else is refused."""
    path = write_squad(tmp_path / "some.json", EVALUATION)
    document = json.loads(path.read_text())
    questions = document["data"][0]["paragraphs"][0]["qas"]
    questions[0] |= {"answers": [], "is_impossible": True}
    path.write_text(json.dumps(document))
    sources = QuestionSources(question_files[0], path)
    loaded = load_subject(files, sources, tmp_path / "tokenizer.json")
    assert ids(loaded.evaluation) == ["some-0-1"]
    questions[1] |= {"answers": [], "is_impossible": True}
    path.write_text(json.dumps(document))
    with pytest.raises(DataFileError, match="has no answerable question"):
        load_subject(files, sources, tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("positions", "buckets"),
    [(31, None), (32, (16, 32)), (63, (16, 32, 48)), (512, tuple(range(16, 385, 16)))],
)
def test_positions(
    files: CheckpointFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    positions: int,
    buckets: tuple[int, ...] | None,
) -> None:
    """Windows fit into what the model reads; too little for one is refused."""
    short = dataclasses.replace(load_checkpoint(files), max_positions=positions)
    monkeypatch.setattr(subject_module, "load_checkpoint", lambda _files: short)
    sources = QuestionSources(
        write_squad(tmp_path / "a.json", CALIBRATION),
        write_many(tmp_path / "b.json", 20),
    )
    if buckets is None:
        with pytest.raises(CheckpointError, match=r"at most 31 tokens; at least 32"):
            load_subject(files, sources, tmp_path / "tokenizer.json")
        return
    loaded = load_subject(files, sources, tmp_path / "tokenizer.json")
    assert loaded.buckets == buckets
    sizes = [len(window) for item in loaded.evaluation for window in item.windows]
    assert max(sizes) <= buckets[-1]
    # Some 110 tokens: only with short windows more than one per question.
    assert (len(sizes) > 20) == (positions < 110)


def test_readers_are_loaded_anew(loaded: Subject) -> None:
    """Quantizing one reader leaves the next as the checkpoint has it."""
    import torch

    one, other = loaded.load_reader(), loaded.load_reader()
    expected = {name: p.clone() for name, p in other.named_parameters()}
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, expected[name])
    assert any(parameter.abs().max() > 0 for parameter in expected.values())


def test_answers(loaded: Subject) -> None:
    """The evaluation questions by default, padded to the next bucket, in batches."""
    shapes: list[tuple[int, int]] = []

    def infer(feed: Any) -> Any:
        found = feed[INPUT_IDS]
        shapes.append(found.shape)
        length = int(feed[ATTENTION_MASK].sum(1).max())
        assert 0 <= found.shape[1] - length < 32
        return (found / 1e4).astype(np.float32), (found / 1e4).astype(np.float32)

    ticks: list[None] = []
    answers = loaded.answer(infer, on_question=lambda: ticks.append(None))
    assert list(answers.texts) == ids(loaded.evaluation)
    assert len(ticks) == len(loaded.evaluation)
    sample = loaded.evaluation[1:]
    assert list(loaded.answer(infer, sample).texts) == ids(sample)
    shapes.clear()
    loaded.answer(infer, loaded.evaluation[:1] * (EVALUATION_BATCH + 1))
    assert [batch for batch, _ in shapes] == [EVALUATION_BATCH, 1]


def test_own_questions(tmp_path: Path) -> None:
    """The project's questions have no file name; any other file has."""
    sources = QuestionSources()
    assert data_name(sources.calibration, "calibration") == "own"
    assert data_name(sources.evaluation, "evaluation") == "own"
    assert data_name(questions_file("evaluation"), "calibration") == "evaluation.json"
    assert data_name(tmp_path / "mine.json", "evaluation") == "mine.json"
    sources.check()
