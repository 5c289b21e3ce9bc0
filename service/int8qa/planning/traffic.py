"""How long questions are: the padded windows that each one asks of an engine.

In: a SQuAD file, and the contract and tokenizer of a model repository. Out: for each
question the padded lengths of its windows. No text leaves this module, and it knows
neither rates nor costs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8qa.build.subject import data_name, questions_file
from int8qa.contract import TOKENIZER_FILENAME, Contract
from int8qa.reader.squad import load_questions
from int8qa.reader.tokenizer import ReaderTokenizer
from int8qa.reader.windows import DOC_STRIDE_TOKENS, split_windows

Question = tuple[int, ...]
"""Padded lengths of its windows in tokens, in their order."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Questions of which the simulation draws, each as likely as any other."""

    name: str
    """``own`` for the package's questions, else the file's name."""
    questions: tuple[Question, ...]
    tokens: int
    """Of all windows, without padding."""

    @property
    def padded_tokens(self) -> int:
        """Of all windows, as engines compute them."""
        return sum(map(sum, self.questions))

    def describe(self) -> dict[str, Any]:
        """Of JSON types."""
        lengths = Counter(length for question in self.questions for length in question)
        return {
            "name": self.name,
            "questions": len(self.questions),
            "windows_mean": round(lengths.total() / len(self.questions), 3),
            "tokens_mean": round(self.tokens / len(self.questions), 1),
            "padding_share": round(1 - self.tokens / self.padded_tokens, 4),
            "windows_by_length": dict(sorted(lengths.items())),
        }


def load_traffic(
    repository: Path,
    contract: Contract,
    data: Path | None = None,
    *,
    limit: int | None = None,
) -> Traffic:
    """Measure the lengths of a question file.

    Args:
        repository: where the tokenizer is.
        contract: the padded lengths, and where windows are cut.
        data: a SQuAD v1.1 or v2.0 file; None: the package's evaluation questions, of
            paragraphs such as SQuAD's, all but a few in one window.
        limit: only the first so many questions.

    Raises:
        DataFileError: the file cannot be read.
        CheckpointError: the repository has no tokenizer.
    """
    path = data or questions_file("evaluation")
    tokenizer = ReaderTokenizer.from_file(repository / TOKENIZER_FILENAME)
    questions = []
    tokens = 0
    for question in load_questions(path)[:limit]:
        windows = split_windows(
            tokenizer,
            question.question,
            question.context,
            max_window_tokens=contract.max_window_tokens,
            doc_stride=min(DOC_STRIDE_TOKENS, contract.max_window_tokens // 2),
        )
        questions.append(tuple(contract.bucket_for(len(w)) for w in windows))
        tokens += sum(map(len, windows))
    return Traffic(data_name(path, "evaluation"), tuple(questions), tokens)
