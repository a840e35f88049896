"""Text blocks to token ids, in this process or in worker processes.

A worker is `python -m data_prep.encode MODEL`: length-prefixed frames on its standard input and output, no pickle. It
ends by itself when its input closes, so killing the parent leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import struct
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_prep.clean import CleanOptions, clean, split_documents
from data_prep.shards import DataError
from data_prep.tokenizer import Tokenizer, open_tokenizer

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


def encode_block(tokenizer: Tokenizer, text: bytes, language: str, options: CleanOptions) -> Encoded:
    """Ids of every line and its end token; lines and documents without a single piece are left out."""
    lines, document_of_line = split_documents(text)
    lines, document_of_line, counts = clean(lines, document_of_line, language, options)
    ids, lengths = tokenizer.encode_lines(lines)
    assert len(lengths) == len(lines)
    with_pieces = lengths > 1
    counts["lines"] += int(with_pieces.sum())
    if not with_pieces.all():
        counts["lines_without_pieces"] += int((~with_pieces).sum())
        ids = ids[np.repeat(with_pieces, lengths)]
        lengths, document_of_line = lengths[with_pieces], document_of_line[with_pieces]
    if not len(lengths):
        return Encoded(b"", np.empty(0, np.uint64), counts)
    starts = np.flatnonzero(np.diff(document_of_line, prepend=-1))
    return Encoded(ids.tobytes(), np.add.reduceat(lengths, starts).astype(np.uint64), counts)


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
            done.set_result(encode_block(self._tokenizer, text, language, self._options))
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
    tokenizer = open_tokenizer(model)
    while True:
        try:
            text_bytes, name_bytes = _REQUEST.unpack(_read(requests, _REQUEST.size))
            language = _read(requests, name_bytes).decode()
            text = _read(requests, text_bytes)
        except EOFError:
            return
        about: dict[str, Any]
        try:
            encoded = encode_block(tokenizer, text, language, options)
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
