"""One notebook executed by papermill, with its kernel's signals and last words."""

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
AUTOSAVE = 300  # seconds; a save rewrites the whole notebook, figures and all


class NotebookError(RuntimeError):
    """A notebook stopped; the message has the cell, the error and the partial notebook's path."""


class Preempted(NotebookError):
    """SIGTERM came, a cluster's request to end; the same command goes on, see RESTART."""


class Interrupted(NotebookError):
    """A notebook was stopped by hand (Ctrl-C)."""


def execute(notebook: Path, target: Path, parameters: dict[str, Any], *, progress: bool) -> None:
    """Executes one notebook into `target`; raises NotebookError and keeps what there is of it.

    What the kernel process itself writes (a library's complaint, a crash report) goes to a passing
    .log beside the target; the message quotes it where the kernel died.
    """
    log = target.with_suffix(".log")
    asked = threading.Event()
    papermill_engines.register("vitgal", Engine)
    try:
        with _quiet(), _reported(notebook.stem, progress) as bar:
            papermill.execute_notebook(
                _literally(notebook),
                _literally(target),
                parameters=parameters,
                engine_name="vitgal",
                kernel_name=KERNEL,
                cwd=str(notebook.parent),
                progress_bar=bar,
                autosave_cell_every=AUTOSAVE,
                kernel_log=log,
                asked=asked,
            )
    except KeyboardInterrupt:
        raise Interrupted(
            f"{notebook.name} was interrupted {_last_cell(target)}\n{_partial(target)}\n"
            "run the same command again to go on: finished stages return at once"
        ) from None
    except (PapermillExecutionError, NoSuchKernel, RuntimeError, TimeoutError) as error:
        if asked.is_set():
            raise Preempted(_ended(notebook, target, getattr(error, "evalue", ""))) from None
        raise NotebookError(_told(error, notebook, target, log)) from None
    else:
        if asked.is_set():  # the last cell caught it: it is meant for the whole chain
            raise Preempted(_ended(notebook, target, "it is finished"))
    finally:
        log.unlink(missing_ok=True)


def _ended(notebook: Path, target: Path, said: str) -> str:
    """What to know after SIGTERM."""
    lines = [f"{notebook.name} was asked to end (SIGTERM) {_last_cell(target)}", said]
    lines += [_partial(target), "run the same command again to go on: finished stages return at"]
    return "\n".join(filter(None, lines)) + " once, others go on from what they have saved"


def _told(error: Exception, notebook: Path, target: Path, log: Path) -> str:
    if isinstance(error, PapermillExecutionError):
        return (
            f"{notebook.name} stopped at In [{error.exec_count}]:\n{head(error.source)}\n"
            f"{error.ename}: {error.evalue}\n{_partial(target)}"
        )
    if isinstance(error, DeadKernelError):
        return (
            f"{notebook.name}: the kernel died {_last_cell(target)}\nmost likely the machine ran "
            "out of memory: lower the batch size or the number of workers\n"
            f"{_last_words(log)}{_partial(target)}"
        )
    return f"{notebook.name}: {error}\n{_last_words(log)}{_partial(target)}"


def head(source: str, lines: int = 3) -> str:
    """The first lines of a cell, indented, with an ellipsis where there are more."""
    kept = [f"    {line}" for line in source.splitlines() if line.strip()]
    return "\n".join(kept[:lines] + (["    ..."] if len(kept) > lines else []))


def _last_cell(target: Path) -> str:
    """Where an executed notebook stands: its last cell that was begun."""
    if not target.exists():
        return "before its first cell"
    cells = nbformat.read(target, as_version=4).cells
    begun = [
        index
        for index, cell in enumerate(cells)
        if cell.cell_type == "code" and cell.metadata.get("papermill", {}).get("start_time")
    ]
    if not begun:
        return "before its first cell"
    number = sum(cell.cell_type == "code" for cell in cells[: begun[-1] + 1])
    return f"in In [{number}]:\n{head(cells[begun[-1]].source)}"


def _partial(target: Path) -> str:
    return f"the notebook as far as it got: {target}"


def _last_words(log: Path) -> str:
    """What a kernel process wrote before it died, in one line: the fatal one, else the last."""
    said = log.read_text(errors="replace").splitlines() if log.exists() else []
    said = [line.strip() for line in said if line.strip() and "IPKernelApp" not in line]
    fatal = [line for line in said if line.startswith("Fatal")]
    return f"the kernel's last words: {(fatal or said)[-1]}\n" if said else ""


def _literally(path: Path) -> str:
    """A path that papermill's own `{name}` substitution gives back as it is."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences papermill's log: its warnings repeat what has been checked, or are wrong.

    It does not know `X | None` and warns of every such parameter as unknown.
    """
    logger = logging.getLogger("papermill")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _reported(name: str, progress: bool) -> Iterator[dict | bool]:
    """Yields papermill's progress_bar: a bar on a terminal, else one line when it is done."""
    if progress and sys.stderr.isatty():
        form = "{desc}: {n_fmt}/{total_fmt} cells [{elapsed}]{postfix}"
        yield {"desc": name, "bar_format": form, "dynamic_ncols": True}
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
    """papermill's client that shows beside its bar what the running cell last said."""

    shown = 0.0  # when, on the monotonic clock
    label = ""  # of the tqdm bar that moved last

    def process_message(self, message: dict, *args: Any, **kwargs: Any) -> Any:
        """Passes a kernel's message on, after showing its text five times a second at most."""
        text = self.activity(message)
        due = time.monotonic() - self.shown > 0.2 or text == ""
        if text is not None and self.nb_man.pbar is not None and due:
            self.shown = time.monotonic()
            self.nb_man.pbar.set_postfix_str(text[:60])
        try:
            return super().process_message(message, *args, **kwargs)
        finally:
            # What a widget shows is answered on the socket where the cell's end is awaited, and
            # sending there can swallow the sign that something has come in (zmq tells only once):
            # about one cell in a hundred with a widget then waited for ever. Asking looks again.
            self.kc.shell_channel.socket.get(zmq.EVENTS)

    def activity(self, message: dict) -> str | None:
        """What a message says of the cell's progress: text, "" for a new cell, None for nothing.

        Text is the last line of a stream, or the count of a tqdm bar, which in a notebook is three
        widgets: a label `name:  40%`, the bar, a text ` 2/5 [00:01<...]`.
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
    """papermill's engine with that client; the kernel's own stdout and stderr go to a file."""

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man: Any,
        kernel_name: str,
        *,
        kernel_log: Path,
        asked: threading.Event,
        **ignored: Any,
    ) -> None:
        """Executes the cells without any limit of time; `asked` is set where SIGTERM came."""
        client = Client(
            nb_man,
            kernel_name=kernel_name,
            timeout=None,
            startup_timeout=300,
            iopub_timeout=60,  # a loaded machine may need long to hand a figure over
            log=logging.getLogger("papermill"),
        )
        with open(kernel_log, "wb") as handle, _sigterm_passed_on(client, asked):
            client.execute(stdout=handle, stderr=handle)


@contextlib.contextmanager
def _sigterm_passed_on(client: Client, asked: threading.Event) -> Iterator[None]:
    """SIGTERM goes to the kernel, in which training saves its state and raises; others just end."""

    def pass_on(*_: object) -> None:
        asked.set()
        if client.km is None or not client.km.has_kernel:
            raise NotebookError("SIGTERM came before the kernel had started")
        os.kill(client.km.provisioner.pid, signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield  # Python hands signals to the main thread alone
        return
    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
