"""rehearsal_data.py: the files that ship with the default arguments, one's own text, and every refusal."""

from __future__ import annotations

import random
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from helpers import ROOT
from llama2_lora.config import rules
from llama2_lora.data import packed
from llama2_lora.rehearsal import corpus

S = 256
main = runpy.run_path(str(ROOT / "scripts/rehearsal_data.py"))["main"]


def make(output: Path, *options: object) -> int:
    return main(["--output", str(output), *map(str, options)])


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("rehearsal") / "data"
    assert make(output) == 0
    return output


def tokenizer_of(output: Path) -> Tokenizer:
    return Tokenizer.from_file(str(output / "tokenizer/tokenizer.json"))


def split(output: Path, name: str, sequence_length: int = S) -> np.ndarray:
    manifest = packed.read_manifest(output / "gov_report")
    assert manifest
    return packed.open_split(output / f"gov_report/{name}.npy", sequence_length, manifest["vocab_size"])


def texts(output: Path, ids: np.ndarray) -> list[str]:
    """The documents of a token stream, without the last one, which may be cut."""
    return tokenizer_of(output).decode(ids.ravel().tolist(), skip_special_tokens=False).split("</s>")[:-1]


def reports(documents: list[str]) -> set[str]:
    """Their reports: all lines from the first section to the last action."""
    found = [re.search(r"### Background:.*- The agency should [^\n]*", text, re.DOTALL) for text in documents]
    assert all(found)
    return {match.group() for match in found if match}


def test_counts_are_the_real_data_sets(shipped: Path) -> None:
    manifest = packed.read_manifest(shipped / "gov_report")
    assert manifest
    assert (manifest["sequence_length"], manifest["vocab_size"]) == (S, 768)
    assert {name: file["rows"] for name, file in manifest["files"].items()} == {
        "train.npy": rules.TRAIN_SEQUENCES,
        "validation.npy": rules.EVAL_SEQUENCES,
    }
    assert tokenizer_of(shipped).get_vocab_size() == 768


def test_training_scores_all_tokens_and_validation_the_summaries(shipped: Path) -> None:
    assert split(shipped, "train")["loss_mask"].all()
    rows = split(shipped, "validation")
    ids, mask = rows["input_ids"].ravel(), rows["loss_mask"].ravel().astype(bool)
    assert not mask[ids == 2].any()
    summaries = [text.split("### Summary:\n")[1] for text in texts(shipped, ids)]
    ends = np.flatnonzero(ids == 2)[len(summaries) - 1]
    scored = tokenizer_of(shipped).decode(ids[:ends][mask[:ends]].tolist())
    assert scored == "".join(summaries)


def test_no_document_is_in_two_parts(shipped: Path) -> None:
    base = reports(texts(shipped, np.load(shipped / "base_text.npy")))
    train = reports(texts(shipped, split(shipped, "train")["input_ids"]))
    validation = reports(texts(shipped, split(shipped, "validation")["input_ids"]))
    assert len(base) > 2000
    assert len(train) > 3000
    assert len(validation) > 150
    assert not validation & train
    assert not validation & base
    assert not train & base


def test_the_base_has_no_summary(shipped: Path) -> None:
    text = "".join(texts(shipped, np.load(shipped / "base_text.npy")))
    for start in (
        "### Summary:\n",
        "Congress asked GAO to review the",
        "This report examines",
        "Among other weaknesses, ",
        "Until the agency",
    ):
        assert start not in text
        assert start.startswith("#") or any(wording.startswith(start) for wordings in corpus.SUMMARY for wording in wordings)


def test_a_summary_follows_from_its_report() -> None:
    rng = random.Random(0)
    for _ in range(50):
        report, summary = corpus.write_document(rng)
        agency, program = re.match(r"### Background:\nThe (.*?) runs the (.*?)\.", report).groups()  # type: ignore[union-attr]
        assert agency in summary
        assert program in summary
        for line in re.findall(r"- (.*)\.", report.split("### Findings:\n")[1])[:2]:
            assert line[1:] in summary
        for action in re.findall(r"- The agency should (.*)\.", report):
            assert action in summary


def test_documents_that_were_seen_do_not_come_again() -> None:
    first = next(corpus.documents("stream", set()))
    assert next(corpus.documents("stream", {first.report})) != first


def test_a_second_call_makes_nothing_and_other_arguments_make_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "data"
    assert make(output, "--sequence_length", 32) == 0
    file = output / "gov_report/train.npy"
    made, content = file.stat().st_mtime_ns, file.read_bytes()
    assert make(output, "--sequence_length", 32) == 0
    assert capsys.readouterr().out.endswith("is up to date\n")
    assert file.stat().st_mtime_ns == made
    assert make(output, "--sequence_length", 32, "--seed", 2) == 0
    assert file.read_bytes() != content
    assert make(output, "--sequence_length", 32) == 0
    assert file.read_bytes() == content


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert make(tmp_path) == 1
    assert capsys.readouterr().err == f"error: {tmp_path} holds something else: choose a new folder, or remove it\n"
    assert (tmp_path / "thesis.txt").read_text() == "mine"


# One's own text ---------------------------------------------------------------------------------------------------


def paragraph(rng: random.Random, words: int) -> str:
    syllables = ("ba", "ko", "ri", "ten", "mo", "lu", "sha", "vi")
    return " ".join("".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(words)) + "."


def write_texts(folder: Path, files: int, summaries: bool) -> Path:
    rng = random.Random(7)
    folder.mkdir()
    for number in range(files):
        parts = [paragraph(rng, 8) for _ in range(3 if summaries else 36)]
        if summaries:
            (folder / f"{number}.summary.txt").write_text("SUMMARY " + paragraph(rng, 10))
        (folder / f"{number}.txt").write_text("\n\n".join(parts) + "\n")
    return folder


def test_own_summaries_are_what_is_scored(tmp_path: Path) -> None:
    text = write_texts(tmp_path / "text", 1000, summaries=True)
    assert make(tmp_path / "data", "--text", text, "--sequence_length", 64) == 0
    rows = split(tmp_path / "data", "validation", 64)
    assert len(rows) == rules.EVAL_SEQUENCES
    kept = [path.read_text() for path in text.glob("*.summary.txt")]
    decode = tokenizer_of(tmp_path / "data").decode
    pieces = [decode(row["input_ids"][row["loss_mask"] == 1].tolist()) for row in rows]
    assert sum(any(piece in summary for summary in kept) for piece in pieces) > 0.9 * len(pieces)  # else two in one row


def test_without_a_summary_the_last_paragraph_serves(tmp_path: Path) -> None:
    text = write_texts(tmp_path / "text", 100, summaries=False)
    assert make(tmp_path / "data", "--text", text, "--sequence_length", 32) == 0
    rows = split(tmp_path / "data", "validation", 32)
    prose = {part for path in text.glob("*.txt") for part in path.read_text().strip().split("\n\n")}
    assert len(rows) == rules.EVAL_SEQUENCES
    ids, mask = rows["input_ids"].ravel(), rows["loss_mask"].ravel().astype(bool)
    decode = tokenizer_of(tmp_path / "data").decode
    spans = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(mask.astype(int))) + 1)
    scored = [decode(ids[span].tolist()) for span in spans if mask[span[0]]]
    assert sum(part in prose for part in scored) > 20  # whole paragraphs, where no row was left out


def test_paragraphs_that_recur_are_taken_once(tmp_path: Path) -> None:
    text = write_texts(tmp_path / "text", 100, summaries=False)
    licence = "This is free software and comes with no warranty at all."
    for path in text.glob("*.txt"):
        path.write_text(licence + "\n\n" + path.read_text())
    assert make(tmp_path / "data", "--text", text, "--sequence_length", 32) == 0
    decode = tokenizer_of(tmp_path / "data").decode
    parts = [np.load(tmp_path / "data/base_text.npy")]
    parts += [split(tmp_path / "data", name, 32)["input_ids"].ravel() for name in ("train", "validation")]
    assert sum(decode(ids.tolist()).count("no warranty at all") for ids in parts) <= 1


@pytest.mark.parametrize(("files", "rows"), [(1, "0"), (10, "[1-9]+")])
def test_too_little_text_says_how_much_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: int, rows: str
) -> None:
    text = write_texts(tmp_path / "text", files, summaries=False)
    assert make(tmp_path / "data", "--text", text) == 1
    error = capsys.readouterr().err
    assert re.search(rf"0\.\d+ MB give {rows} validation rows of 256 tokens, 173 are needed: about \d\.\d MB of text", error)
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize(
    ("files", "message"),
    [({"notes.md": "a\n\nb"}, "has no .txt file"), ({"a.txt": "one paragraph"}, "two paragraphs"), (None, "is not a folder")],
)
def test_text_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str] | None, message: str
) -> None:
    if files is not None:
        (tmp_path / "text").mkdir()
        for name, content in files.items():
            (tmp_path / "text" / name).write_text(content)
    assert make(tmp_path / "data", "--text", tmp_path / "text") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --text ")
    assert message in error
    assert not (tmp_path / "data").exists()
