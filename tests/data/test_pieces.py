"""Pieces: which files are found, where they are cut, and that the tokens are those of the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxgpt.data import pieces
from mlxgpt.data.tokenizer import BPETokenizer

GPT2 = BPETokenizer.gpt2()


@given(
    st.lists(
        st.sampled_from(["a", "Z", "é", "日", "7", ".", "'", "s", " ", " ", "\n", "\n", "\r", "\t", "\u3000", "\xa0"])
    ),
    st.integers(1, 8),
    st.integers(16, 40),
)
@settings(max_examples=300, deadline=None)
def test_the_pieces_of_a_text_have_the_tokens_of_the_whole(tmp_path_factory, characters, piece, window):
    text = "".join(characters)
    file = tmp_path_factory.getbasetemp() / "pieces.txt"
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", piece)
        patch.setattr(pieces, "SCAN_BYTES", window)
        source = pieces.InputFile(file, "pieces.txt", "text", len(text.encode()), 0)
        cut = list(pieces.cut_text(source, 0, [(source.size, "train")]))
    parts = [file.read_bytes()[p.begin : p.end].decode() for p in cut]
    assert "".join(parts) == text
    assert [p.ends_document for p in cut] == [False] * (len(cut) - 1) + [True] * bool(cut)
    assert [i for part in parts for i in GPT2.encode(part)] == GPT2.encode(text).tolist()


@pytest.mark.parametrize(
    ("text", "cut"), [("日本\n語彙", 6), ("ab cd", 2), ("日本\u3000\n\u3000語彙", 19), ("a\n\xa0b", 5)]
)
def test_a_text_is_cut_between_characters_that_are_visible_in_unicode(text, cut, tmp_path):
    """GPT-2's tokens are the same for any of these cuts; those of another vocabulary may differ."""
    (tmp_path / "text.txt").write_bytes(text.encode())
    with open(tmp_path / "text.txt", "rb") as file:
        assert pieces.text_cut(file, 1, len(text.encode())) == cut


def test_pieces_are_small_with_and_without_line_breaks(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    monkeypatch.setattr(pieces, "SCAN_BYTES", 64)
    for separator in ("\n", " ", "。\n"):
        text = separator.join(["word" if separator != "。\n" else "日本語"] * 2000)
        file = tmp_path / "text.txt"
        file.write_text(text)
        (source,), _ = pieces.find_inputs([str(file)])
        cut = list(pieces.cut_text(source, 0, [(source.size, "train")]))
        assert max(p.end - p.begin for p in cut) < 1000 + 2 * 64
        assert len(cut) >= source.size // 1100


def test_a_document_stays_in_its_split_when_others_are_appended():
    splits = [pieces.split_of("a.jsonl", n, 0.1) for n in range(5000)]
    assert 400 < splits.count("val") < 600
    assert [pieces.split_of("b.jsonl", n, 0.1) for n in range(5000)] != splits
    more = [pieces.split_of("a.jsonl", n, 0.2) for n in range(5000)]
    assert {n for n in range(5000) if splits[n] == "val"} < {n for n in range(5000) if more[n] == "val"}


def test_directories_and_globs_are_searched_and_other_files_left_out(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("a.txt", "sub/b.md", "sub/c.py", ".hidden"):
        (tmp_path / "in" / name).write_text(f"text of {name}\n" * 30)
    (tmp_path / "in" / "empty.txt").write_text("")
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG\0\xff")
    inputs, left_out = pieces.find_inputs([str(tmp_path / "in")])
    assert [i.name for i in inputs] == ["a.txt", "sub/b.md", "sub/c.py"]
    assert left_out == 2
    by_glob, _ = pieces.find_inputs([str(tmp_path / "in" / "**" / "[abc].*"), str(tmp_path / "in" / "a.txt")])
    assert by_glob == inputs


def test_a_glob_may_lead_through_the_parent_directory(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    for name in ("a.txt", "b.txt", ".hidden.txt"):
        (tmp_path / name).write_text("text")
    monkeypatch.chdir(tmp_path / "here")
    inputs, _ = pieces.find_inputs(["../*.txt", "../a.txt"])
    assert [i.name for i in inputs] == ["a.txt", "b.txt"]
