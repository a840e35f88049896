"""Text blocks to token ids, in this process or in worker processes.

A worker is `python -m data_prep.encode MODEL`: length-prefixed frames on its standard input and output, no pickle. It
ends by itself when its input closes, so killing the parent leaves nothing behind. Ids are those of XLM-R: SentencePiece
piece + 1, `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, `<mask>` last.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import signal
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import sentencepiece

from data_prep.clean import CleanOptions, clean, split_documents
from data_prep.layout import TOKEN_DTYPE
from data_prep.shards import BOS_ID, EOS_ID, UNK_ID, DataError

MODEL_NAMES = ("sentencepiece.bpe.model", "spiece.model", "tokenizer.model")
KNOWN_SENTENCEPIECE = "0.2.3"
SPM_UNK, SPM_BOS, SPM_EOS = 0, 1, 2
_REQUEST = struct.Struct("<QQ")  # bytes of text, bytes of the language's name
_REPLY = struct.Struct("<QQQ")  # bytes of JSON, of token ids, of document lengths


class WorkerDied(DataError):
    """A tokenising process is gone; without it the run cannot go on."""


@dataclass
class Encoded:
    """What one block became."""

    tokens: bytes
    document_lengths: np.ndarray
    counts: Mapping[str, int]


class Tokenizer:
    """A SentencePiece model in XLM-R's layout."""

    def __init__(self, path: str | Path) -> None:
        self.path = find_model(Path(path))
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (OSError, RuntimeError) as error:
            raise DataError(f"{self.path} is not a SentencePiece model ({error}). Give the .model file.") from error
        special = (self.processor.unk_id(), self.processor.bos_id(), self.processor.eos_id())
        if special != (SPM_UNK, SPM_BOS, SPM_EOS):
            raise DataError(
                f"{self.path} numbers <unk>, <s>, </s> as {special}; models of the XLM-R family have (0, 1, 2). "
                "Use the tokenizer of the teacher."
            )
        self.num_pieces: int = self.processor.get_piece_size()
        self.vocab_size = self.num_pieces + 2
        self._ids = np.arange(1, self.num_pieces + 1, dtype=TOKEN_DTYPE)
        self._ids[:3] = UNK_ID, BOS_ID, EOS_ID

    def _id_buffers(self, lines: list[bytes]) -> Sequence[Any]:
        """The int32 ids of every line and its `</s>`, as buffers.

        What the library does for return_type="numpy", less an array object per line: on text of short lines that is a fifth of
        all time. Its inner call is private, so it is used in the one version where it was read.
        """
        if sentencepiece.__version__ == KNOWN_SENTENCEPIECE:
            inner: Any = self.processor
            return inner._processor._EncodeAsBufferBatch(lines, 1, None, False, -1, 0.1, False, True, False)
        return self.processor.encode(lines, return_type="numpy", add_eos=True, num_threads=1)

    def encode_block(self, text: bytes, language: str, options: CleanOptions) -> Encoded:
        """Ids of every line followed by `</s>`; lines and documents without a single piece are left out."""
        lines, document_of_line = split_documents(text)
        lines, document_of_line, counts = clean(lines, document_of_line, language, options)
        # joined buffers are faster than lists of integers; </s> ends every line and is never inside one
        pieces = np.frombuffer(b"".join(self._id_buffers(lines)), np.int32)
        lengths = np.diff(np.flatnonzero(pieces == SPM_EOS), prepend=-1)
        assert len(lengths) == len(lines)
        with_pieces = lengths > 1
        counts["lines"] += int(with_pieces.sum())
        if not with_pieces.all():
            counts["lines_without_pieces"] += int((~with_pieces).sum())
            pieces = pieces[np.repeat(with_pieces, lengths)]
            lengths, document_of_line = lengths[with_pieces], document_of_line[with_pieces]
        if not len(lengths):
            return Encoded(b"", np.empty(0, np.uint64), counts)
        starts = np.flatnonzero(np.diff(document_of_line, prepend=-1))
        return Encoded(self._ids.take(pieces).tobytes(), np.add.reduceat(lengths, starts).astype(np.uint64), counts)


def find_model(path: Path) -> Path:
    """The SentencePiece model itself or the one inside a Hugging Face directory."""
    if path.is_file():
        return path
    for name in MODEL_NAMES:
        if (path / name).is_file():
            return path / name
    what = "holds none of " + ", ".join(MODEL_NAMES) if path.is_dir() else "does not exist"
    raise DataError(
        f"Tokenizer {path} {what}. Give a SentencePiece .model file or a directory with one (XLM-R ships it as "
        "sentencepiece.bpe.model; a lone tokenizer.json is not enough). From the Hub: hf download "
        "FacebookAI/xlm-roberta-large sentencepiece.bpe.model --local-dir DIR."
    )


class WorkerPool:
    """`num_workers` encoders. One worker means this process itself, with no child and no copy."""

    def __init__(self, tokenizer: Tokenizer, options: CleanOptions, num_workers: int) -> None:
        self._tokenizer, self._options = tokenizer, options
        self._workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        self._all: list[_Worker] = []
        if num_workers > 1:
            self._all = [_Worker(tokenizer.path, options) for _ in range(num_workers)]
            for worker in self._all:
                self._workers.put(worker)
            self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="encode")

    def submit(self, text: bytes, language: str) -> Future[Encoded]:
        if self._threads is not None:
            return self._threads.submit(self._encode_in_worker, text, language)
        done: Future[Encoded] = Future()
        try:
            done.set_result(self._tokenizer.encode_block(text, language, self._options))
        except DataError as error:
            done.set_exception(error)
        return done

    def _encode_in_worker(self, text: bytes, language: str) -> Encoded:
        worker = self._workers.get()
        try:
            return worker.encode(text, language)
        finally:
            self._workers.put(worker)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._all:
            worker.close()


class _Worker:
    """One child process and its two pipes."""

    def __init__(self, model: Path, options: CleanOptions) -> None:
        package_root = str(Path(__file__).resolve().parent.parent)
        search_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "data_prep.encode", str(model), json.dumps(options.as_dict())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": search_path},
            bufsize=0,
        )

    def encode(self, text: bytes, language: str) -> Encoded:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _write(process.stdin, _REQUEST.pack(len(text), len(language)) + language.encode())
            _write(process.stdin, text)
            sizes = _REPLY.unpack(_read(process.stdout, _REPLY.size))
            about, tokens, lengths = (_read(process.stdout, size) for size in sizes)
        except (BrokenPipeError, EOFError) as error:
            raise WorkerDied(
                f"A tokenising process ended with status {process.wait()} (negative: killed by that signal; -9 is "
                "mostly too little memory). Run the same command again, with fewer --workers; it goes on where it was."
            ) from error
        reply = json.loads(about)
        if "error" in reply:
            raise DataError(reply["error"])
        return Encoded(tokens, np.frombuffer(lengths, np.uint64), reply["counts"])

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _write(pipe: Any, data: bytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[pipe.write(view) :]


def _read(pipe: Any, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while len(view):
        count = pipe.readinto(view)
        if not count:
            raise EOFError
        view = view[count:]
    return bytes(data)


def serve(model: str, options: CleanOptions, requests: BinaryIO, replies: BinaryIO) -> None:
    """The child's loop: one frame of text in, one reply out, until the input closes."""
    tokenizer = Tokenizer(model)
    while True:
        try:
            text_bytes, name_bytes = _REQUEST.unpack(_read(requests, _REQUEST.size))
            language = _read(requests, name_bytes).decode()
            text = _read(requests, text_bytes)
        except EOFError:
            return
        about: dict[str, Any]
        try:
            encoded = tokenizer.encode_block(text, language, options)
            about = {"counts": encoded.counts}
        except DataError as error:
            encoded, about = Encoded(b"", np.empty(0, np.uint64), {}), {"error": str(error)}
        parts = (json.dumps(about).encode(), encoded.tokens, encoded.document_lengths.tobytes())
        try:
            _write(replies, _REPLY.pack(*map(len, parts)))
            for part in parts:
                _write(replies, part)
        except BrokenPipeError:
            return


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes our input
    with open(0, "rb", buffering=0) as stdin, open(1, "wb", buffering=0) as stdout:
        serve(sys.argv[1], CleanOptions(**json.loads(sys.argv[2])), stdin, stdout)
