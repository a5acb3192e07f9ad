"""Execution of a notebook by papermill: progress, signals, and messages about failures."""

import contextlib
import html
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill
import zmq
from jupyter_client.kernelspec import NoSuchKernel
from nbclient.exceptions import DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

KERNEL = "python3"
AUTOSAVE = 300  # seconds; each save rewrites the whole notebook with its figures


class NotebookError(RuntimeError):
    """A notebook stopped; the message has the cell, the error and the path of the partial copy."""


class Preempted(NotebookError):
    """The process received SIGTERM, as from a cluster's scheduler; the same command continues."""


class Interrupted(NotebookError):
    """The user pressed Ctrl-C."""


def execute(notebook: Path, target: Path, parameters: dict[str, Any], *, progress: bool) -> None:
    """Executes a notebook and writes the executed copy to `target`, also where a cell fails.

    Args:
        parameters: What papermill injects, by name.
        progress: Whether to show a bar on a terminal, and elsewhere a line for the notebook.

    Raises:
        NotebookError: A cell failed, or the kernel died or did not start.
        Interrupted: Ctrl-C was pressed.
        Preempted: SIGTERM came.
    """
    # Crash reports and warnings of the kernel's process, which messages quote.
    log = target.with_suffix(".log")
    sigterm = threading.Event()
    papermill_engines.register("vitgal", Engine)
    try:
        with _silent_papermill(), _progress_bar(notebook.stem, progress) as bar:
            papermill.execute_notebook(
                _escaped(notebook),
                _escaped(target),
                parameters=parameters,
                engine_name="vitgal",
                kernel_name=KERNEL,
                cwd=str(notebook.parent),
                progress_bar=bar,
                autosave_cell_every=AUTOSAVE,
                kernel_log=log,
                sigterm=sigterm,
            )
    except KeyboardInterrupt:
        raise Interrupted(
            f"{notebook.name} was interrupted {_last_cell(target)}\n{_partial(target)}\n"
            "run the same command again to go on: finished stages return at once"
        ) from None
    except (PapermillExecutionError, NoSuchKernel, RuntimeError, TimeoutError) as error:
        if sigterm.is_set():
            reason = getattr(error, "evalue", "")
            raise Preempted(_preemption_message(notebook, target, reason)) from None
        raise NotebookError(_failure_message(error, notebook, target, log)) from None
    else:
        if sigterm.is_set():  # a cell handled the signal, but it is meant for the whole chain
            raise Preempted(_preemption_message(notebook, target, "it is finished"))
    finally:
        log.unlink(missing_ok=True)


def _preemption_message(notebook: Path, target: Path, reason: str) -> str:
    lines = [
        f"{notebook.name} was asked to end (SIGTERM) {_last_cell(target)}",
        reason,
        _partial(target),
        "run the same command again to go on: finished stages return at once, others go on from "
        "what they have saved",
    ]
    return "\n".join(filter(None, lines))


def _failure_message(error: Exception, notebook: Path, target: Path, log: Path) -> str:
    if isinstance(error, PapermillExecutionError):
        return (
            f"{notebook.name} stopped at In [{error.exec_count}]:\n{head(error.source)}\n"
            f"{error.ename}: {error.evalue}\n{_partial(target)}"
        )
    if isinstance(error, DeadKernelError):
        return (
            f"{notebook.name}: the kernel died {_last_cell(target)}\nmost likely the machine ran "
            "out of memory: lower the batch size or the number of workers\n"
            f"{last_output(log)}{_partial(target)}"
        )
    return f"{notebook.name}: {error}\n{last_output(log)}{_partial(target)}"


def head(source: str, lines: int = 3) -> str:
    """Returns the first lines of a cell, indented, with an ellipsis where there are more."""
    text = [f"    {line}" for line in source.splitlines() if line.strip()]
    return "\n".join(text[:lines] + (["    ..."] if len(text) > lines else []))


def _last_cell(target: Path) -> str:
    """Returns the number and source of the last cell that an executed notebook began."""
    if not target.exists():
        return "before its first cell"
    cells = nbformat.read(target, as_version=4).cells
    code_cells = [cell for cell in cells if cell.cell_type == "code"]
    started = [
        f"in In [{number}]:\n{head(cell.source)}"
        for number, cell in enumerate(code_cells, start=1)
        if cell.metadata.get("papermill", {}).get("start_time")
    ]
    return started[-1] if started else "before its first cell"


def _partial(target: Path) -> str:
    return f"the notebook as far as it got: {target}"


def last_output(log: Path) -> str:
    """Returns the last line that a kernel's process wrote, or the fatal one; "" without any."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    lines = [line.strip() for line in lines if line.strip() and "IPKernelApp" not in line]
    fatal = [line for line in lines if line.startswith("Fatal")]
    return f"the kernel's last output: {(fatal or lines)[-1]}\n" if lines else ""


def _escaped(path: Path) -> str:
    """Returns a path that papermill's substitution of `{name}` leaves unchanged."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextlib.contextmanager
def _silent_papermill() -> Iterator[None]:
    """Silences papermill's log, which reports each parameter declared `X | None` as unknown."""
    logger = logging.getLogger("papermill")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _progress_bar(name: str, progress: bool) -> Iterator[dict | bool]:
    """Yields papermill's option `progress_bar`; without a terminal, prints a line instead."""
    if progress and sys.stderr.isatty():
        bar_format = "{desc}: {n_fmt}/{total_fmt} cells [{elapsed}]{postfix}"
        yield {"desc": name, "bar_format": bar_format, "dynamic_ncols": True}
        return
    began = time.monotonic()
    if progress:
        print(f"{name}: ", end="", file=sys.stderr, flush=True)
    outcome = "stopped"
    try:
        yield False
        outcome = "done"
    finally:
        if progress:
            print(f"{outcome} after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


class Client(PapermillNotebookClient):
    """papermill's client, which also shows the running cell's last output beside its bar."""

    last_shown = 0.0  # seconds on the monotonic clock
    label = ""  # of the tqdm bar that moved last

    def process_message(self, message: dict, *args: Any, **kwargs: Any) -> Any:
        """Processes a kernel's message and shows its text, at most five times a second."""
        text = self.activity(message)
        due = time.monotonic() - self.last_shown > 0.2 or text == ""
        if text is not None and self.nb_man.pbar is not None and due:
            self.last_shown = time.monotonic()
            self.nb_man.pbar.set_postfix_str(text[:60])
        try:
            return super().process_message(message, *args, **kwargs)
        finally:
            # Replies to a widget are sent on the socket where the end of the cell is awaited, and
            # sending can consume zmq's single notice of an incoming message: about one cell with a
            # widget in a hundred then waited for ever. Reading the events renews the notice.
            self.kc.shell_channel.socket.get(zmq.EVENTS)

    def activity(self, message: dict) -> str | None:
        """Returns the text by which a message shows progress, "" for a new cell, None otherwise.

        The text is the last line of a stream, or the count of a tqdm bar. In a notebook such a bar
        is three widgets: a label `name:  40%`, the bar, a text ` 2/5 [00:01<...]`.
        """
        content = message["content"]
        if message["msg_type"] == "execute_input":
            return ""
        if message["msg_type"] == "stream":
            return (re.split(r"[\r\n]+", content["text"].strip()) or [""])[-1] or None
        value = content.get("data", {}).get("state", {}).get("value")
        if message["msg_type"] != "comm_msg" or not isinstance(value, str):
            return None
        value = " ".join(html.unescape(value).split())
        if value.endswith("%"):
            self.label = value.rpartition(":")[0]
        return f"{self.label} {value}".strip() if re.search(r"\d/\S+ \[", value) else None


class Engine(NBClientEngine):
    """papermill's engine with our client; the kernel's own stdout and stderr go to a file."""

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: Any,
        kernel_name: str,
        *,
        kernel_log: Path,
        sigterm: threading.Event,
        **ignored: Any,
    ) -> None:
        """Executes the cells without a time limit; sets `sigterm` when that signal comes."""
        client = Client(
            nb_man,
            kernel_name=kernel_name,
            timeout=None,
            startup_timeout=300,
            iopub_timeout=60,  # a busy machine may be slow to deliver a figure
            log=logging.getLogger("papermill"),
        )
        with open(kernel_log, "wb") as handle, _forwarded_sigterm(client, sigterm):
            client.execute(stdout=handle, stderr=handle)


@contextlib.contextmanager
def _forwarded_sigterm(client: Client, sigterm: threading.Event) -> Iterator[None]:
    """Forwards SIGTERM to the kernel, where training saves its state before it ends."""

    def forward(*_: object) -> None:
        """Notes the signal and sends it to the kernel; NotebookError where there is none yet."""
        sigterm.set()
        if client.km is None or not client.km.has_kernel:
            raise NotebookError("SIGTERM came before the kernel had started")
        os.kill(client.km.provisioner.pid, signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only
        return
    before = signal.signal(signal.SIGTERM, forward)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
