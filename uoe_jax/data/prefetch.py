"""A thread that makes the next batch while the device works on this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from uoe_jax.errors import DataError


class Prefetch[T]:
    """Iterator over `make(step)`, one step ahead of its reader; also a context manager.

    An error in `make` is raised where its batch is asked for, with a note of the step.
    Raises DataError for one that would end the reader's loop without a word.
    """

    def __init__(
        self, make: Callable[[int], T], start_step: int, end_step: int | None = None
    ):
        self._make, self._step, self._end = make, start_step, end_step
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._next: Future[T] | None = self._submit()

    def _submit(self) -> Future[T] | None:
        if self._end is not None and self._step >= self._end:
            return None
        return self._pool.submit(self._make_one, self._step)

    def _make_one(self, step: int) -> T:
        try:
            return self._make(step)
        except Exception as error:
            if not isinstance(error, (StopIteration, StopAsyncIteration)):
                error.add_note(f"while batch {step} was made")
                raise
            # It would end the reader's loop as if this were the last batch.
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        except (SystemExit, GeneratorExit) as error:  # nor may data end the process
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise DataError(f"batch {step} can't be made: its source raised {reason}")

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._next is None:
            self.close()
            raise StopIteration
        try:
            result = self._next.result()
        except BaseException:
            self.close()
            raise
        self._step += 1
        self._next = self._submit()
        return result

    def close(self) -> None:
        """Stop the thread; no more batches come."""
        self._next = None
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def prefetch[T](
    make: Callable[[int], T], start_step: int, end_step: int | None = None
) -> Prefetch[T]:
    """Return an iterator over `make(start_step)`, `make(start_step + 1)`, ...

    It ends before `end_step`, or never. Close it, or use it in a `with` statement.
    """
    return Prefetch(make, start_step, end_step)
