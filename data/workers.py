"""Tasks on all cores, in processes that end with the main one, whatever ends that."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed

from tqdm import tqdm


def do_all(work: Callable, tasks: list[tuple], **bar_settings) -> None:
    """work(*task) for each task: in processes on all cores, as threads would wait for Python's
    lock; one task alone, in this process. bar_settings: of a progress bar."""
    with tqdm(total=len(tasks), **bar_settings) as bar:
        if len(tasks) < 2 or os.cpu_count() == 1:
            for task in tasks:
                work(*task)
                bar.update()
            return
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(mp_context=spawn, initializer=end_with_main) as pool:
            try:
                with ThreadPoolExecutor(1) as thread:  # Ctrl-C interrupts the main one mid-start
                    if os.name == "posix":  # a worker inherits it, until it ignores Ctrl-C itself
                        thread.submit(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGINT})
                    started = list(thread.map(lambda task: pool.submit(work, *task), tasks))
                for done in as_completed(started):
                    done.result()
                    bar.update()
            except BaseException:  # an error, or Ctrl-C: other tasks may have hours to go
                for process in multiprocessing.active_children():
                    process.terminate()
                raise


def end_with_main() -> None:
    """In a worker: Ctrl-C is for the main process. When that has ended, so does the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = multiprocessing.parent_process()
    threading.Thread(target=lambda: main.join() or os._exit(1), daemon=True).start()
