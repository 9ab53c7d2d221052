"""The processes that tokenize for `data index`."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event

from megatron_r1.data.index_progress import IndexProgress
from megatron_r1.data.parts import Writer
from megatron_r1.data.pieces import Piece
from megatron_r1.errors import DataError

# Forked, not spawned: importing transformers anew takes seconds, and here no thread is running yet.
_CONTEXT = multiprocessing.get_context("fork")
_WATCH_SECONDS = 0.2


def write_parts(writer: Writer, pieces: list[Piece], workers: int) -> None:
    """Write the parts that are not there yet.

    Raises:
        DataError: of a document, or a worker was killed.
    """
    different = {writer.part(piece).stem: piece for piece in pieces}  # a file may be in two inputs
    missing = [piece for piece in different.values() if not writer.part(piece).whole()]
    if not missing:
        return
    total = sum(piece.nbytes for piece in different.values())
    done = total - sum(piece.nbytes for piece in missing)
    stop = _CONTEXT.Event()
    with ProcessPoolExecutor(min(workers, len(missing)), _CONTEXT, _begin, (writer, stop, os.getpid())) as pool:
        try:
            futures = {pool.submit(_write, piece): piece for piece in missing}  # the first one forks all workers
            with IndexProgress(total, done) as progress:
                for future in as_completed(futures):
                    progress.advance(futures[future].nbytes, future.result())
        except BrokenProcessPool as error:
            raise DataError(
                "a worker of `data index` was killed, perhaps for lack of memory: set fewer `workers`; the same "
                "command goes on with what is finished"
            ) from error
        except BaseException:
            stop.set()
            raise


class _Worker:
    """What a worker process keeps from one piece to the next."""

    writer: Writer


def _begin(writer: Writer, stop: Event, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which then stops its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not what the command does on it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the threads
    threading.Thread(target=_leave, args=(stop, parent), daemon=True).start()
    _Worker.writer = writer


def _leave(stop: Event, parent: int) -> None:
    """When told so, or when the command has been killed outright."""
    while os.getppid() == parent and not stop.wait(_WATCH_SECONDS):
        pass
    os._exit(1)


def _write(piece: Piece) -> int:
    """Returns how many documents the piece has."""
    return _Worker.writer.write(piece)
