"""Encoding blocks of text in worker processes.

In: blocks of text. Out: futures of `Encoded`. The workers are forks, so they share one copy of the model and do not load it.
Requests and replies are length-prefixed frames on two pipes for each worker; nothing is pickled. A worker exits when its pipe of
requests closes, so no worker survives a killed parent.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import signal
import struct
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, BinaryIO, ClassVar

import numpy as np

from data_prep.child import run_and_exit
from data_prep.clean import CleanOptions
from data_prep.encode import Encoded, encode_block
from data_prep.shards import DataError
from data_prep.tokenizer import Tokenizer

IN_FLIGHT = 2  # blocks per worker: one being encoded, the next waiting in the pipe
PIPE_BYTES = 1 << 20  # a complete block fits, so that neither side waits for the other
_REQUEST = struct.Struct("<QQ?")  # bytes of text, bytes of the language's name, `is_cut` of `encode_block`
_REPLY = struct.Struct("<QQQ")  # bytes of JSON, of token ids, of document lengths


class WorkerDied(DataError):
    """A tokenising process has ended. The run cannot continue without it."""


class WorkerPool:
    """Encoders in `num_workers` processes; one worker is this process itself. Create it before any thread starts: it forks."""

    def __init__(self, tokenizer: Tokenizer, options: CleanOptions, num_workers: int) -> None:
        self._tokenizer, self._options = tokenizer, options
        self._free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        self._all: list[_Worker] = []
        if num_workers > 1:
            self._all = [_Worker(tokenizer, options) for _ in range(num_workers)]
            for worker in self._all * IN_FLIGHT:
                self._free.put(worker)
            self._threads = ThreadPoolExecutor(num_workers * IN_FLIGHT, thread_name_prefix="encode")

    def submit(self, text: bytes, language: str, is_cut: bool = False) -> Future[Encoded]:
        """Encode one block, as `encode_block`. The future raises `DataError` if the options reject the text or a worker died."""
        if self._threads is not None:
            return self._threads.submit(self._encode_in_worker, text, language, is_cut)
        done: Future[Encoded] = Future()
        try:
            done.set_result(encode_block(self._tokenizer, text, language, self._options, is_cut))
        except DataError as error:
            done.set_exception(error)
        return done

    def _encode_in_worker(self, text: bytes, language: str, is_cut: bool) -> Encoded:
        worker = self._free.get()
        try:
            return worker.encode(text, language, is_cut)
        finally:
            self._free.put(worker)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel pending blocks and end the workers."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._all:
            worker.close()


class _Worker:
    """One forked process and the parent's ends of its two pipes."""

    # Of all workers. Each fork closes them; otherwise the pipes of requests would never close.
    _parents_ends: ClassVar[set[int]] = set()

    def __init__(self, tokenizer: Tokenizer, options: CleanOptions) -> None:
        requests, self._requests = _pipe()
        self._replies, replies = _pipe()
        self._parents_ends.update({self._requests.fileno(), self._replies.fileno()})
        self._sending, self._last_reply = threading.Lock(), threading.Event()
        self._last_reply.set()
        self._status: int | None = None
        self._pid = os.fork()
        if self._pid == 0:
            run_and_exit(lambda: self._serve(tokenizer, options, requests, replies))
        requests.close()
        replies.close()

    def _serve(self, tokenizer: Tokenizer, options: CleanOptions, requests: BinaryIO, replies: BinaryIO) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and closes the pipe of requests
        for descriptor in self._parents_ends:
            os.close(descriptor)
        serve(tokenizer, options, requests, replies)

    def encode(self, text: bytes, language: str, is_cut: bool = False) -> Encoded:
        """The reply to one request. At most `IN_FLIGHT` threads may call this at a time."""
        try:
            with self._sending:
                _write(self._requests, _REQUEST.pack(len(text), len(language), is_cut) + language.encode())
                _write(self._requests, text)
                before, mine = self._last_reply, threading.Event()
                self._last_reply = mine
            before.wait()
            try:
                sizes = _REPLY.unpack(_read(self._replies, _REPLY.size))
                about, tokens, lengths = (_read(self._replies, size) for size in sizes)
            finally:
                mine.set()
        except (BrokenPipeError, EOFError) as error:
            raise WorkerDied(
                f"A tokenising process ended with status {self._ended()} (negative: killed by that signal; -9 is "
                "mostly too little memory). Run the same command again, with fewer --workers; it continues after the last finished shard."
            ) from error
        reply = json.loads(about)
        if "error" in reply:
            raise DataError(reply["error"])
        return Encoded(tokens, np.frombuffer(lengths, np.uint64), reply["counts"])

    def _ended(self) -> int | None:
        """The exit status of the process."""
        with self._sending:
            if self._status is None:
                with suppress(ChildProcessError):
                    self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
            return self._status

    def close(self) -> None:
        self._parents_ends.difference_update({self._requests.fileno(), self._replies.fileno()})
        self._requests.close()
        self._ended()
        self._replies.close()


def _pipe() -> tuple[Any, Any]:
    """The reading and the writing end of a pipe, unbuffered, of `PIPE_BYTES` if the system allows it."""
    reading, writing = os.pipe()
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with suppress(OSError):  # the total size of a user's pipes is limited
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return open(reading, "rb", buffering=0), open(writing, "wb", buffering=0)


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


def serve(tokenizer: Tokenizer, options: CleanOptions, requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer each request with one reply, until the pipe of requests closes."""
    while True:
        try:
            text_bytes, name_bytes, is_cut = _REQUEST.unpack(_read(requests, _REQUEST.size))
            language = _read(requests, name_bytes).decode()
            text = _read(requests, text_bytes)
        except EOFError:
            return
        about: dict[str, Any]
        try:
            encoded = encode_block(tokenizer, text, language, options, is_cut)
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
