"""Reads words with tags from CoNLL-U files (UPOS) and from files with one word and its tag per line (UPOS or entities).

In: a file of a UD treebank, Universal NER, WikiANN, XTREME, MasakhaNER or CoNLL 2002/2003. Out: `TaggedSentences`. The
words of CoNLL-U are its syntactic words: multiword tokens (`1-2`) and empty nodes (`8.1`) are skipped and counted.
Entity tags are converted to IOB2.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.errors import UserError, did_you_mean
from pipeline.evaluation.finetuning.entities import SCHEMES, contradictions, entities, iob2, split_tag
from pipeline.evaluation.lines import text_lines

UPOS = tuple("ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X".split())
CONLLU_COLUMNS = 10
GREATEST_SHARE_MIXED = (
    0.01  # of a file's sentences; released files of MasakhaNER 2.0 have up to 0.2 % that are not IOB2
)
DOCUMENT_LINE = "-DOCSTART-"
Labels = Literal["upos", "entities"]
Line = tuple[int, str]  # its number and its text
Word = tuple[int, str, str]  # the number of its line, the word and its tag
_NODE = re.compile(r"(?P<first>[0-9]+)(?:(?P<kind>[-.])(?P<second>[0-9]+))?")


@dataclass
class TaggedSentences:
    """Sentence i: its words and, for each word, its tag.

    Attributes:
        scheme: of entity tags in the file; `tags` are IOB2 in every case
        skipped: number of multiword tokens and empty nodes
    """

    words: list[list[str]] = field(default_factory=list)
    tags: list[list[str]] = field(default_factory=list)
    labels: Labels = "upos"
    scheme: str = ""
    skipped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.words)

    @property
    def num_words(self) -> int:
        return sum(map(len, self.words))


def read_conllu(path: Path, most: int | None) -> TaggedSentences:
    """Words and UPOS tags of the first `most` sentences of a CoNLL-U file."""
    found = TaggedSentences()
    for lines in itertools.islice(sentences_of(path, comments=True), most):
        words: list[str] = []
        tags: list[str] = []
        covered = 0  # the last word of the multiword token before
        for number, line in lines:
            where = f"{path}, line {number}"
            cells = line.split("\t")
            if len(cells) != CONLLU_COLUMNS:
                raise UserError(
                    f"{where}: {len(cells)} tab-separated columns, CoNLL-U has {CONLLU_COLUMNS}: {line[:60]!r}. Correct the line, "
                    "or name a directory of CoNLL-U files."
                )
            kind, last = _node(cells[0], len(words), covered, where)
            if kind:
                found.skipped[kind] += 1
                covered = max(covered, last)
                continue
            if cells[3] not in UPOS:
                raise UserError(
                    f"{where}: unknown UPOS tag {cells[3][:40]!r}; {did_you_mean(cells[3], UPOS)} UPOS tags: {', '.join(UPOS)}"
                )
            words.append(cells[1])
            tags.append(cells[3])
        if covered > len(words):
            raise UserError(
                f"{path}, line {lines[-1][0]}: the sentence ends at word {len(words)}, but a multiword token reaches to word "
                f"{covered}. Correct the sentence."
            )
        if words:
            found.words.append(words)
            found.tags.append(tags)
    if found.words and all(word == "_" for words in found.words for word in words):
        raise UserError(
            f"{path} has no words: every FORM is `_`. This treebank is distributed without its text; merge the text as its "
            "README says, or name another treebank."
        )
    return _some(found, path)


def _node(identifier: str, num_words: int, covered: int, where: str) -> tuple[str, int]:
    """What a line without a word of its own is ("" for a word), and the last word that it covers."""
    match = _NODE.fullmatch(identifier)
    if match:
        first, last = int(match["first"]), int(match["second"] or 0)
        if match["kind"] == "-" and covered < first == num_words + 1 < last:
            return "multiword tokens", last
        if match["kind"] == "." and first == num_words and last >= 1:
            return "empty nodes", 0
        if not match["kind"] and first == num_words + 1:
            return "", 0
    raise UserError(
        f"{where}: the id {identifier[:20]!r} after {num_words} word(s) of the sentence. CoNLL-U counts words from 1 in each "
        f"sentence; here may follow the word {num_words + 1}, a multiword token that begins with it ({num_words + 1}-"
        f"{num_words + 2}), or an empty node ({num_words}.1). Correct the line, or separate sentences by an empty line."
    )


def read_columns(path: Path, most: int | None, layout: str, lenient: bool) -> TaggedSentences:
    """Words and tags of the first `most` sentences of a file with one word per line.

    Args:
        layout: "uner" has the word and its tag in columns 2 and 3; all others have them in the first and the last column;
            in "wikiann" the language and a colon may be before every word
        lenient: whether many sentences may contradict all schemes; seqeval's rules say where their entities begin and end
    """
    rows: list[list[Word]] = []
    for lines in itertools.islice(sentences_of(path, comments=layout == "uner"), most):
        rows.append([(number, *_word_and_tag(line, layout, f"{path}, line {number}")) for number, line in lines])
    if layout == "wikiann" and rows and rows[0][0][1].startswith(prefix := f"{path.parent.name}:"):
        rows = [[(n, _without(prefix, word, f"{path}, line {n}"), tag) for n, word, tag in words] for words in rows]
    return _some(tagged_sentences(rows, f"{path}, line", lenient), path)


def _word_and_tag(line: str, layout: str, where: str) -> tuple[str, str]:
    cells = line.split("\t") if "\t" in line else [*([""] if line[0].isspace() else []), *line.split()]  # an empty word
    first, last = (1, 2) if layout == "uner" else (0, -1)
    if len(cells) < 2 + first:
        hint = (
            "XTREME's scripts remove the tags of test files; take these from WikiANN or UD"
            if layout == "xtreme"
            else ("Separate them by a tab or a blank, and sentences by an empty line")
        )
        raise UserError(f"{where}: {len(cells)} column(s), expected a word and its tag: {line[:60]!r}. {hint}.")
    return cells[first].strip(), cells[last].strip()


def _without(prefix: str, word: str, where: str) -> str:
    if not word.startswith(prefix):
        raise UserError(
            f"{where}: {word[:40]!r} does not begin with {prefix!r}, as the words before do. Correct the line."
        )
    return word.removeprefix(prefix)


def tagged_sentences(rows: list[list[Word]], where: str, lenient: bool) -> TaggedSentences:
    """The sentences, after a check of their tags. Entity tags become IOB2.

    Args:
        where: of messages; the number of a word's line is written after it
        lenient: as in `read_columns`
    """
    words = [[word for _, word, _ in sentence] for sentence in rows]
    tags = [[tag for *_, tag in sentence] for sentence in rows]
    if all(tag in UPOS for tag in tags[0]) if tags else True:
        for number, _, tag in (one for sentence in rows for one in sentence):
            if tag not in UPOS:
                raise UserError(f"{where} {number}: {tag[:40]!r} is no UPOS tag, but those before are. Correct it.")
        return TaggedSentences(words, tags)
    against: dict[str, list[int]] = {
        scheme: [] for scheme in SCHEMES
    }  # lines, one of each sentence that does not follow it
    converted = []
    for sentence in rows:
        split = [_entity_tag(tag, f"{where} {number}") for number, _, tag in sentence]
        for scheme, place in contradictions(split):
            against[scheme].append(sentence[place][0])
        converted.append(iob2(entities(split), len(split)))
    scheme = min(SCHEMES, key=lambda scheme: len(against[scheme]))
    if len(against[scheme]) > GREATEST_SHARE_MIXED * len(rows) and not lenient:
        counts = ", ".join(f"{len(lines)} are not {one} (the first: line {lines[0]})" for one, lines in against.items())
        raise UserError(
            f"{where} {against[scheme][0]}: the tags mix schemes: of {len(rows)} sentences {counts}. Correct them, or accept seqeval's "
            "reading, in which an I- or E- that continues no entity of its type begins one: --set tagging.scheme=lenient"
        )
    exceptions = f" but for {len(against[scheme])} sentence(s)" if against[scheme] else ""
    return TaggedSentences(words, converted, "entities", f"{scheme}{exceptions}")


def _entity_tag(tag: str, where: str) -> tuple[str, str]:
    if (split := split_tag(tag)) is None:
        raise UserError(
            f"{where}: {tag[:40]!r} is no tag of an entity (O, B-PER, I-PER, E-PER, S-PER), and the first sentence has no UPOS "
            "tags. Correct it; in a file, the tag is in the last column."
        )
    return split


def sentences_of(path: Path, comments: bool) -> Iterator[list[Line]]:
    """The sentences of a file: its non-empty lines between empty ones, without `-DOCSTART-` lines and byte order mark.

    `comments`: whether lines that begin with `#` are skipped
    """
    lines: list[Line] = []
    for number, line in text_lines(path, " (CoNLL 2002 is Latin-1: iconv -f latin1 -t utf-8)"):
        if not line.strip():
            if lines:
                yield lines
            lines = []
        elif not (comments and line.startswith("#")) and not line.startswith(DOCUMENT_LINE):
            lines.append((number, line))
    if lines:
        yield lines


def _some(found: TaggedSentences, path: Path) -> TaggedSentences:
    if not found.words:
        raise UserError(f"{path} has no sentences. Name another directory: --set tagging.data=DIR")
    return found
