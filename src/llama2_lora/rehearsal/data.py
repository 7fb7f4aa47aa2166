"""Rows of GovReport's shape from generated reports or one's own text, their tokenizer, and the base model's text.

The benchmark packs reports and their summaries into rows of 8,192 tokens, trains on all of it and scores the summaries.
So does this, 3,901 training and 173 validation rows as there, in rows that two CPU cores can train on.

The three texts share no document. The base text has reports alone: what a summary is remains for the adapter to learn. But
the words of (its own documents') summaries occur in it, in random order, since an adapter on attention alone cannot raise
a token that the frozen output layer has never seen.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llama2_lora import files
from llama2_lora.config import rules
from llama2_lora.data import packed
from llama2_lora.rehearsal import corpus
from llama2_lora.rehearsal.corpus import PROMPT, Document

VOCABULARY = 768  # tokens
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2, as Llama-2 has them
BEGIN, END = 1, 2
TOKENIZER_DOCUMENTS = 1000
BASE_DOCUMENTS = 3500  # at most; 600,000 tokens of generated reports
WORDS_PER_REPORT = 12  # of a summary, in random order
ROWS = {"validation": rules.EVAL_SEQUENCES, "train": rules.TRAIN_SEQUENCES}
OWN_ROWS = {"validation": rules.EVAL_SEQUENCES, "train": rules.EVAL_EVERY_SEQUENCES}  # the least that --text must give
OWN_SHARES = {"base": 0.5, "validation": 0.15, "train": 0.35}
SCORED = {"validation": "summary", "train": "all"}
CHARACTERS_PER_TOKEN = 2.5  # English prose, with a vocabulary of this size


# Documents: {"base": ..., "validation": ..., "train": ...}, disjoint ------------------------------------------------


def generated_parts(seed: int) -> dict[str, Iterable[Document]]:
    """Endless streams; a report that one of them has given does not come again in any."""
    seen: set[str] = set()
    return {part: corpus.documents(f"{seed} {part}", seen) for part in OWN_SHARES}


def own_parts(folder: Path, seed: int, row_characters: int) -> dict[str, Iterable[Document]]:
    """One's own documents, shuffled and dealt out. No paragraph is taken twice: licences and headers recur in many files."""
    documents = list(own_documents(folder, row_characters))
    if not documents:
        raise ValueError(f"--text {folder}: has no .txt file with two paragraphs, or with a summary in NAME.summary.txt")
    random.Random(seed).shuffle(documents)
    rest = iter(documents)
    return {part: list(islice(rest, round(share * len(documents)))) for part, share in OWN_SHARES.items()}


def own_documents(folder: Path, row_characters: int) -> Iterator[Document]:
    seen: set[str] = set()
    for path in text_files(folder):
        summary = path.with_name(f"{path.stem}.summary.txt")
        text = new_paragraphs(path, seen)
        if summary.is_file():
            texts = [(text, new_paragraphs(summary, seen))]
        else:
            texts = [(part[:-1], part[-1:]) for part in gathered(text, row_characters)]
        for report, end in texts:
            if report and end:
                yield Document("\n".join(report), "\n".join(end))


def text_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.txt") if not path.name.endswith(".summary.txt"))


def new_paragraphs(path: Path, seen: set[str]) -> list[str]:
    """The file's paragraphs, each in one line, without those in `seen`, where they are noted."""
    found = (" ".join(part.split()) for part in re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="ignore")))
    new = [paragraph for paragraph in dict.fromkeys(found) if paragraph and paragraph not in seen]
    seen.update(new)
    return new


def gathered(paragraphs: list[str], characters: int) -> Iterator[list[str]]:
    """Runs of two paragraphs or more, of at least so many characters (the last run may be shorter)."""
    run: list[str] = []
    for paragraph in paragraphs:
        run.append(paragraph)
        if len(run) > 1 and sum(map(len, run)) >= characters:
            yield run
            run = []
    yield run


# Tokens -----------------------------------------------------------------------------------------------------------


def train_tokenizer(documents: Iterable[Document]) -> Tokenizer:
    """Byte-level BPE with single digits, <s> in front of a prompt."""
    tokenizer = Tokenizer(models.BPE())
    digits, split = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, split])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    texts = [PROMPT, *(text for document in islice(documents, TOKENIZER_DOCUMENTS) for text in document)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encoded(documents: Iterable[Document], tokenizer: Tokenizer, tokens: int) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, summary ids) of as many documents as have `tokens` tokens together, or of all."""
    pairs: list[tuple[list[int], list[int]]] = []
    rest = iter(documents)
    while tokens > 0 and (some := list(islice(rest, 256))):
        prompts = tokenizer.encode_batch([PROMPT.format(report=document.report) for document in some])
        summaries = tokenizer.encode_batch([document.summary for document in some], add_special_tokens=False)
        new = [(prompt.ids, summary.ids) for prompt, summary in zip(prompts, summaries, strict=True)]
        tokens -= sum(len(prompt) + len(summary) + 1 for prompt, summary in new)
        pairs += new
    return pairs


def base_text(documents: Iterable[Document], tokenizer: Tokenizer, rng: random.Random) -> np.ndarray:
    """Token ids of reports, each followed by words of a summary and of the prompt: words without sentences."""
    texts: list[str] = []
    words: list[str] = []
    for document in documents:
        words = words or shuffled_words(document.summary + PROMPT.replace("{report}", " "), rng)
        some, words = words[:WORDS_PER_REPORT], words[WORDS_PER_REPORT:]
        texts.append(f"{document.report}\n{' '.join(some)}")
    ids = [[*encoding.ids, END] for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate(ids).astype(np.uint16)


def shuffled_words(text: str, rng: random.Random) -> list[str]:
    words = sorted(set(text.split()))
    rng.shuffle(words)
    return words


# Files ------------------------------------------------------------------------------------------------------------


def fill(folder: Path, text: Path | None, seed: int, sequence_length: int) -> None:
    """Fill `folder`. ValueError where one's own text is too short."""
    row_characters = round(sequence_length * CHARACTERS_PER_TOKEN)
    parts = own_parts(text, seed, row_characters) if text else generated_parts(seed)
    base = list(islice(parts["base"], BASE_DOCUMENTS))
    tokenizer = train_tokenizer(base)
    save_tokenizer(tokenizer, folder / "tokenizer")
    for part, rows in ROWS.items():
        # A row without a scored token is left out: 10 % more tokens make up for them.
        pairs = encoded(parts[part], tokenizer, round(1.1 * rows * sequence_length))
        ids_NS, mask_NS = packed_rows(pairs, sequence_length, SCORED[part])
        if text and len(ids_NS) < OWN_ROWS[part]:
            raise ValueError(too_short(text, part, len(ids_NS), sequence_length))
        packed.write_split(folder / "gov_report" / f"{part}.npy", ids_NS[:rows], mask_NS[:rows])
    np.save(folder / "base_text.npy", base_text(base, tokenizer, random.Random(seed)))
    source = f"text files of {text.name}" if text else "generated reports"
    packed.write_manifest(folder / "gov_report", sequence_length, VOCABULARY, source, f"seed {seed}")


def packed_rows(pairs: list[tuple[list[int], list[int]]], sequence_length: int, score: str) -> tuple[np.ndarray, np.ndarray]:
    """`packed.pack`, with no rows where the documents fill none."""
    if sum(len(prompt) + len(summary) + 1 for prompt, summary in pairs) < sequence_length:
        return np.empty((0, sequence_length), np.uint16), np.empty((0, sequence_length), np.uint8)
    return packed.pack(pairs, sequence_length, END, score)


def too_short(text: Path, part: str, rows: int, sequence_length: int) -> str:
    """The larger of what the rows that came and the characters of a row tell; 10 % more to be sure."""
    size, least = sum(path.stat().st_size for path in text.rglob("*.txt")), OWN_ROWS[part]
    total_rows = max(OWN_ROWS[name] / OWN_SHARES[name] for name in OWN_ROWS)
    needed = 1.1 * max(size * least / rows if rows else 0, total_rows * sequence_length * CHARACTERS_PER_TOKEN)
    return (
        f"--text {text}: {size / 1e6:.2f} MB give {rows} {part} rows of {sequence_length} tokens, {least} are needed: "
        f"about {needed / 1e6:.1f} MB of text without repetitions, or a shorter --sequence_length"
    )


def recipe_of(text: Path | None, seed: int, sequence_length: int) -> str:
    """What decides the output: the arguments, the programs and one's own files."""
    texts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(text.rglob("*.txt"))] if text else []
    programs = [files.file_sha256(Path(file)) for file in (__file__, corpus.__file__, packed.__file__)]
    return json.dumps({"seed": seed, "sequence_length": sequence_length, "programs": programs, "text": texts}, indent=1)


def make(output: Path, text: Path | None, seed: int, sequence_length: int) -> bool:
    """Make the folder where it is not up to date; returns whether it had to. Raises ValueError on wrong arguments."""
    if text and not text.is_dir():
        raise ValueError(f"--text {text}: is not a folder")
    if sequence_length < 16:
        raise ValueError(f"--sequence_length {sequence_length}: must be 16 or more")
    recipe = recipe_of(text, seed, sequence_length)
    if files.is_up_to_date(output, recipe):
        return False
    with files.new_folder(output, recipe) as folder:
        fill(folder, text, seed, sequence_length)
    return True


def rows_of(output: Path) -> dict[str, int]:
    """Rows of each split of a folder that `make` made."""
    found = (packed.read_manifest(output / "gov_report") or {})["files"]
    return {part: found[f"{part}.npy"]["rows"] for part in ("train", "validation")}
