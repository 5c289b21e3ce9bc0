"""Texts that hurt tokenizers, for Hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

AWKWARD = (
    "the", "Mill", "unaffable", "1788", "O'Neill", "café", "cafe\u0301", "Łukasz",
    "👩‍🚀", "🇸🇪", "😀", "שלום", "بُنيت", "東京駅", "\u200b", "\u202e", "\x00", "\ufeff",
    "\u0301", "İ", "ß", "ﬁ", "—", "...", "[SEP]", "[CLS]", "\u00ad", "𝔘𝔫", "e\u0323\u0302",
)  # fmt: skip
SPACES = (" ", "  ", "\n", "\r\n", "\t", "\u00a0", "", "\u2028")

words = st.one_of(
    st.sampled_from(AWKWARD),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6),
)


def texts(max_words: int) -> st.SearchStrategy[str]:
    """Words, emoji, marks, controls and right-to-left text with any spacing."""
    pieces = st.tuples(words, st.sampled_from(SPACES)).map("".join)
    return st.lists(pieces, max_size=max_words).map("".join)
