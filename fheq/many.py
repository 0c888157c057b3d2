"""Compiling and running many programs in processes, where a crash of native code costs one program and not the whole run."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fheq.arguments import is_number
from fheq.circuit import Circuit, failure_probabilities
from fheq.circuit import compile as compile_one
from fheq.display.console import number, text_table
from fheq.display.progress import track
from fheq.errors import ArgumentError, CompileError
from fheq.program import IntProgram

Then = Callable[[Circuit], Any]


@dataclass(frozen=True)
class Compiled:
    """What became of one program. A circuit itself cannot leave its process.

    Args:
        key: which program: its key, or its position.
        complexity, bootstraps: as of `Circuit`; None when it was not compiled.
        value: what `then` gave.
        error: what went wrong, or None.
        seconds: that compiling and `then` took.
    """

    key: Hashable
    complexity: float | None = None
    bootstraps: int | None = None
    value: Any = None
    error: str | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing went wrong."""
        return self.error is None


def compiled_table(results: Sequence[Compiled]) -> str:
    """Results of `compile_many` as text."""
    rows = [
        [str(r.key), *("-" if v is None else number(v) for v in (r.complexity, r.bootstraps, r.seconds)), r.error or "ok"]
        for r in results
    ]
    return text_table(("program", "complexity", "bootstraps", "seconds", "outcome"), rows)


def compile_many(
    programs: Mapping[Any, IntProgram] | Sequence[IntProgram],
    then: Then | None = None,
    *,
    p_error: float | Mapping[Any, float] | None = None,
    global_p_error: float | None = None,
    executor: Executor | None = None,
    workers: int | None = None,
    timeout: float | None = None,
    progress: bool | None = None,
) -> list[Compiled]:
    """Compiles programs in other processes, and does something with each circuit there.

    A worker that dies costs the program that it had: that one is reported with an error, the others are run again. To know
    which one it was, no more than `workers` are under way at a time, and those are then tried one by one, here.

    Args:
        programs: by key (whatever names a configuration), or a sequence.
        then: called with each circuit, in the process that compiled it, for instance to run it encrypted; it and what it
            returns must be picklable (a function of a module, or `functools.partial` of one).
        p_error: for all, or by key.
        global_p_error: as for `compile`.
        executor: any `concurrent.futures.Executor`, such as that of a Dask client; by default a pool of processes (started
            by "spawn", so scripts need `if __name__ == "__main__":`). One that breaks is replaced by such a pool.
        workers: programs under way at a time; as many as processors by default.
        timeout: seconds after which a program's process is ended (in other processes only: a thread cannot be).

    Returns:
        One result per program, in order. Nothing is raised for a program that fails.

    Raises:
        ArgumentError: (a ValueError) a probability outside of (0, 1), none for a program, or both kinds; a timeout that
            is not positive.
        CompileError: `then` cannot be sent to other processes.
    """
    keyed = dict(programs) if isinstance(programs, Mapping) else dict(enumerate(programs))
    missing = [key for key in keyed if isinstance(p_error, Mapping) and key not in p_error]
    if missing:
        raise ArgumentError(f"p_error has no probability for program {missing[0]!r}")
    chances = {key: p_error[key] if isinstance(p_error, Mapping) else p_error for key in keyed}
    for chance in chances.values():
        failure_probabilities(chance, global_p_error)
    if timeout is not None and not (is_number(timeout) and timeout > 0):
        raise ArgumentError(f"timeout must be a positive number of seconds, got {timeout!r}")
    if executor is None:
        _check_picklable(then)
    items = {key: (key, program, chances[key], global_p_error) for key, program in keyed.items()}
    found: dict[Any, Compiled] = {}
    results = run_all(partial(_compile, then), items, executor, workers or os.cpu_count() or 1, timeout)
    for key, result in track(results, "compiling", progress, total=len(items)):
        found[key] = Compiled(key, error=_explain(result)) if isinstance(result, BaseException) else result
    return [found[key] for key in keyed]


def _check_picklable(then: Then | None) -> None:
    try:
        pickle.dumps(then)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise CompileError(
            f"then cannot be sent to other processes ({error}): give a function of a module, or functools.partial of one"
        ) from error


def _compile(then: Then | None, item: tuple[Any, IntProgram, float | None, float | None]) -> Compiled:
    key, program, p_error, global_p_error = item
    start = time.perf_counter()
    result = Compiled(key)
    try:
        circuit = compile_one(program, p_error, global_p_error)
        result = replace(result, complexity=circuit.complexity, bootstraps=circuit.bootstraps)
        result = replace(result, value=None if then is None else then(circuit))
    except Exception as error:
        result = replace(result, error=_explain(error))
    return replace(result, seconds=time.perf_counter() - start)


def _explain(error: BaseException) -> str:
    if _died(error):
        return "the process that compiled or ran it died: a crash of native code, or too little memory"
    return f"{type(error).__name__}: {error}"


def run_all(
    task: Callable[[Any], Any],
    items: Mapping[Any, Any],
    executor: Executor | None,
    workers: int,
    timeout: float | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Runs `task` on every item, each in a process, yielding keys with results, or with the exception that an item met.

    Args:
        items: by key.
        executor: the first to use; it is not shut down. Those that follow a broken one are pools of processes.
        workers: items under way at a time.
        timeout: seconds that an item may take.
    """
    waiting, task = deque(items), partial(_within, timeout, task)
    while waiting:
        pool = executor or _pool(min(workers, len(waiting)))
        try:
            suspects = yield from _until_broken(task, items, pool, waiting, workers)
        finally:
            if pool is not executor:
                pool.shutdown(cancel_futures=True)
        executor = None
        for key in suspects:  # whoever kills a process that it has for itself did it before
            yield key, _alone(task, items[key], timeout)


def _alone(task: Callable[[Any], Any], item: Any, timeout: float | None) -> Any:
    with _pool(1) as pool:
        pool.submit(callable, task).result()  # it has started, and imported what the task needs
        start = time.perf_counter()
        future = pool.submit(task, item)
        error = future.exception()
        if timeout is not None and _died(error) and time.perf_counter() - start >= timeout:
            return TimeoutError(f"not done after {timeout:g} seconds")
        return error or future.result()


def _within(timeout: float | None, task: Callable[[Any], Any], item: Any) -> Any:
    """`task(item)`, ending the process after `timeout` seconds, even when native code hangs; not the user's own process."""
    if timeout is None or multiprocessing.parent_process() is None:
        return task(item)
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(timeout, exit=True, file=nowhere)
        try:
            return task(item)
        finally:
            faulthandler.cancel_dump_traceback_later()


def _died(error: BaseException | None) -> bool:
    """Whether an item's process died; in a Dask cluster, after Dask's own attempts on other workers."""
    return isinstance(error, BrokenExecutor) or type(error).__name__ == "KilledWorker"


def _pool(workers: int) -> Executor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _until_broken(task: Callable, items: Mapping, pool: Executor, waiting: deque, workers: int):
    """Takes keys from `waiting` until none are left or the pool breaks; returns those under way where a process died."""
    running: dict[Future, Any] = {}
    suspects: list[Any] = []
    broken = False
    while (waiting and not broken) or running:
        while waiting and len(running) < workers and not broken:
            key = waiting.popleft()
            try:
                running[pool.submit(task, items[key])] = key
            except BrokenExecutor:
                suspects.append(key)
                broken = True
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            key = running.pop(future)
            error = future.exception()
            broken = broken or isinstance(error, BrokenExecutor)
            if _died(error):
                suspects.append(key)
            else:
                yield key, error or future.result()
    return suspects
