"""The demo's text: prose only, every paragraph once, windows that share nothing."""

import pytest
import torch

from afbs_compile.commands.errors import CommandError
from afbs_compile.demo import text


def test_default_is_the_same_every_time_and_long_enough():
    assert text.default() == text.default()
    assert len(text.default().split()) > 20_000  # two windows of 8192 tokens


def test_no_paragraph_comes_twice():
    paragraphs = text.default().split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)


def test_default_is_prose():
    for paragraph in text.default().split("\n\n"):
        assert paragraph.endswith(".")
        assert not [sign for sign in (">>>", "::=", "  ", "\n") if sign in paragraph]


def test_prose_leaves_code_headings_and_grammar_out():
    sentence = "This is a sentence, long enough to be taken for prose by those who read it twice."
    raw = f"""Heading
*******

{sentence}

   >>> print("code that is long enough to be a paragraph, had it any more letters in it (1, 2)")

   rule ::= this is a rule of a grammar that has many letters and could be prose but for its sign.

1. {sentence}
"""
    assert list(text.prose(raw)) == [sentence, sentence]


def test_windows_do_not_overlap():
    first, second = text.windows(torch.arange(100), 40, 2)
    assert first.tolist() == list(range(40))
    assert second.tolist() == list(range(40, 80))


def test_short_text_says_what_is_needed():
    with pytest.raises(CommandError, match="has 79 tokens, 2 windows of 40 need 80"):
        text.windows(torch.arange(79), 40, 2)
    with pytest.raises(CommandError, match="--tokens is 0"):
        text.windows(torch.arange(79), 0, 2)


def test_unreadable_text_is_named(tmp_path):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xff")
    for path in (tmp_path / "none", binary):
        with pytest.raises(CommandError, match=f"{path.name} cannot be read"):
            text.read(path)
    binary.write_text("Grüße", encoding="utf-8")
    assert text.read(binary) == "Grüße"
