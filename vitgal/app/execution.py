"""Execution of a notebook by papermill: the kernel, progress, signals and messages of failures."""

import contextlib
import html
import itertools
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill
import zmq.asyncio
from ipykernel.kernelspec import make_ipkernel_cmd
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from traitlets import default

from vitgal import runs

KERNEL = "python3"  # the kernel's name in the notebooks; `Kernel` starts this interpreter for it
AUTOSAVE = 300  # seconds; each save rewrites the whole notebook with its figures
PRINTED = 200_000  # most characters kept of a cell's printed text
# Executed in the kernel; see `Kernel`.
UNLIMITED = (
    "(lambda thread, zmq: thread.schedule(lambda: thread.socket.setsockopt(zmq.SNDHWM, 0)))"
    "(get_ipython().kernel.iopub_thread, __import__('zmq'))"
)
AGAIN = "run the same command again to go on: finished stages return at once"


class NotebookError(RuntimeError):
    """A notebook stopped; the message has the cell, the error and the path of the partial copy."""

    status = 1  # exit status of the command


class Preempted(NotebookError):
    """The process received SIGTERM, as from a cluster's scheduler; the same command continues."""

    status = os.EX_TEMPFAIL  # 75, "try again later"


class Interrupted(NotebookError):
    """The user pressed Ctrl-C."""

    status = 130


def _working_folder(notebook: Path) -> Path:
    """Returns the notebook's folder; for an installed wheel's own notebooks the user's."""
    here = runs.checkout()
    installed = here != runs.bundled_folder() and notebook.is_relative_to(runs.bundled_folder())
    return here if installed else notebook.parent


def execute(notebook: Path, target: Path, parameters: dict[str, Any], *, progress: bool) -> None:
    """Executes a notebook and writes the executed copy to `target`, also where a cell fails.

    `progress` shows a bar on a terminal, elsewhere a line. Raises NotebookError where a cell fails
    or the kernel dies or does not start, Interrupted for Ctrl-C, Preempted for SIGTERM.
    """
    # Crash reports and warnings of the kernel's process, which messages quote.
    log = target.with_suffix(".log")
    sigterm = threading.Event()
    # papermill warns that every parameter declared `X | None` is unknown.
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    papermill_engines.register("vitgal", Engine)
    try:
        with _progress_bar(notebook.stem, progress) as bar:
            papermill.execute_notebook(
                _escaped(notebook),
                _escaped(target),
                parameters=parameters,
                engine_name="vitgal",
                kernel_name=KERNEL,
                cwd=str(_working_folder(notebook)),
                progress_bar=bar,
                autosave_cell_every=AUTOSAVE,
                kernel_log=log,
                sigterm=sigterm,
            )
        # A cell may have handled the signal; the remaining notebooks must not start.
        reason = "it is finished"
    except KeyboardInterrupt:
        where = f"{notebook.name} was interrupted {_last_cell(target)}"
        raise Interrupted(f"{where}\n{_partial(target)}\n{AGAIN}") from None
    except (PapermillExecutionError, RuntimeError, TimeoutError) as error:
        # Training raises Preempted after it has saved its state.
        ended = getattr(error, "ename", "") == "Preempted"
        if not (ended or sigterm.is_set()):
            raise NotebookError(_failure(error, notebook, target, log)) from None
        reason = getattr(error, "evalue", "")
        if ended and not sigterm.is_set():
            raise Preempted(f"{reason}\n{_partial(target)}") from None
    finally:
        log.unlink(missing_ok=True)
    if sigterm.is_set():
        where = f"{notebook.name} was asked to end (SIGTERM) {_last_cell(target)}"
        lines = [
            where,
            reason,
            _partial(target),
            f"{AGAIN}, others continue from their saved state",
        ]
        raise Preempted("\n".join(filter(None, lines)))


def _failure(error: Exception, notebook: Path, target: Path, log: Path) -> str:
    if isinstance(error, PapermillExecutionError):
        where = f"stopped at In [{error.exec_count}]:\n{head(error.source)}"
        return f"{notebook.name} {where}\n{error.ename}: {error.evalue}\n{_partial(target)}"
    reason = str(error)
    if isinstance(error, DeadKernelError):
        reason = (
            f"the kernel died {_last_cell(target)}\nmost likely the machine ran out of memory: "
            "lower the batch size or the number of workers"
        )
    return f"{notebook.name}: {reason}\n{last_output(log)}{_partial(target)}"


def head(source: str, lines: int = 3) -> str:
    """Returns the first lines of a cell, indented, with an ellipsis where there are more."""
    text = [f"    {line}" for line in source.splitlines() if line.strip()]
    return "\n".join(text[:lines] + (["    ..."] if len(text) > lines else []))


def _last_cell(target: Path) -> str:
    """Returns the number and source of the last cell that an executed notebook began."""
    cells = nbformat.read(target, as_version=4).cells if target.exists() else []
    codes = [cell for cell in cells if cell.cell_type == "code"]
    begun = [c.metadata.get("papermill", {}).get("start_time") is not None for c in codes]
    if True not in begun:
        return "before its first cell"
    number = len(begun) - begun[::-1].index(True)
    return f"in In [{number}]:\n{head(codes[number - 1].source)}"


def _partial(target: Path) -> str:
    return f"the notebook as far as it got: {target}"


def last_output(log: Path) -> str:
    """Returns the kernel process's fatal error, else its last line; "" if it wrote none."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    lines = [line.strip() for line in lines if line.strip() and "IPKernelApp" not in line]
    fatal = [line for line in lines if line.startswith("Fatal")]
    return f"the kernel's last output: {(fatal or lines)[-1]}\n" if lines else ""


def _escaped(path: Path) -> str:
    """Returns a path that papermill's substitution of `{name}` leaves unchanged."""
    return str(path).replace("{", "{{").replace("}", "}}")


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


class Kernel(AsyncKernelManager):
    """Starts this interpreter, regardless of the kernels that are installed."""

    @default("context")
    def _unlimited_context(self) -> zmq.asyncio.Context:
        # By default zmq drops messages when 1,000 wait, and a cell whose last message is lost never
        # ends. The limit is lifted here and, by UNLIMITED, in the kernel.
        context = self._context_default()
        context.setsockopt(zmq.RCVHWM, 0)
        return context

    @property
    def kernel_spec(self) -> KernelSpec:
        """The kernel of this interpreter, without the user's IPython profile and start-up file."""
        options = ["--IPKernelApp.exec_PYTHONSTARTUP=False"]
        return KernelSpec(
            argv=make_ipkernel_cmd(extra_arguments=options),
            display_name="Python 3 (ipykernel)",
            language="python",
        )


class Client(PapermillNotebookClient):
    """papermill's client, which limits printed text and shows its last line beside the bar."""

    last_update = 0.0  # seconds on the monotonic clock
    label = ""  # of the tqdm bar that moved last

    def papermill_execute_cells(self) -> None:
        """Executes the cells; raises NotebookError if the kernel runs another Python."""
        expressions = {"python": "__import__('sys').executable", "limit": UNLIMITED}
        reply = self.wait_for_reply(self.kc.execute("", silent=True, user_expressions=expressions))
        executable = (
            reply["content"]["user_expressions"]["python"].get("data", {}).get("text/plain")
        )
        if executable != repr(sys.executable):
            raise NotebookError(f"the kernel is {executable}, not this Python, {sys.executable}")
        super().papermill_execute_cells()

    def output(self, outs: list, msg: dict, display_id: str | None, cell_index: int) -> Any:
        """Adds an output; printed text is appended to the text just before it.

        Otherwise a progress bar would add an output at every step.
        """
        out = super().output(outs, msg, display_id, cell_index)
        if out is None or out.output_type != "stream":
            return out
        for earlier in itertools.takewhile(lambda o: o.output_type == "stream", outs[-2::-1]):
            if earlier.name == out.name:
                outs.pop()
                earlier.text = appended(earlier.text, out.text)
                return earlier
        out.text = appended("", out.text)
        return out

    def process_message(self, message: dict, cell: nbformat.NotebookNode, cell_index: int) -> Any:
        """Processes a kernel's message and shows its text, at most five times a second."""
        text = self.activity(message)
        due = time.monotonic() - self.last_update > 0.2 or text == ""
        if text is not None and self.nb_man.pbar is not None and due:
            self.last_update = time.monotonic()
            self.nb_man.pbar.set_postfix_str(runs.printable(text)[:60])
        try:
            return super().process_message(message, cell, cell_index)
        finally:
            # Replies to a widget are sent on the socket that receives the end of the cell, and
            # sending can consume zmq's only notification of a received message: about 1 % of the
            # cells with widgets never ended. Reading EVENTS renews the notification.
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


def appended(text: str, more: str) -> str:
    r"""Returns `text` followed by `more`, where `\r` overwrites a line as on a terminal.

    A text of more than PRINTED characters loses its middle.
    """
    done, newline, last = text.rpartition("\n")
    lines = (last + more).split("\n")
    text = done + newline + "\n".join(line[line.rstrip("\r").rfind("\r") + 1 :] for line in lines)
    if len(text) <= PRINTED:
        return text
    return f"{text[: PRINTED // 2]}\n[...]\n{text[-PRINTED // 2 :]}"


class Engine(NBClientEngine):
    """papermill's engine with `Client`; the kernel's own stdout and stderr go to a file."""

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
            kernel_manager_class=Kernel,
            timeout=None,
            startup_timeout=300,
            iopub_timeout=600,  # a busy machine may deliver printed text late
            log=logging.getLogger("papermill"),
        )
        with (
            open(kernel_log, "wb") as handle,
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
            _forwarded_sigterm(client, sigterm),
        ):
            # A cell's figures are drawn once more where they are shown, in the style of this file.
            style = Path(profile, "matplotlibrc")
            style.touch()
            environment = os.environ | {"IPYTHONDIR": profile, "MATPLOTLIBRC": str(style)}
            client.execute(stdout=handle, stderr=handle, env=environment)


@contextlib.contextmanager
def _forwarded_sigterm(client: Client, sigterm: threading.Event) -> Iterator[None]:
    """Forwards SIGTERM, and SIGHUP as SIGTERM, to the kernel, where training saves its state."""

    def forward(*_: object) -> None:
        """Sends the signal to the kernel; raises NotebookError before the kernel has started."""
        sigterm.set()
        client.shutdown_kernel = "immediate"  # when the cell has ended: schedulers soon kill
        if client.km is None or not client.km.has_kernel:
            raise NotebookError("SIGTERM came before the kernel had started")
        os.kill(client.km.provisioner.pid, signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only
        return
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)  # the terminal is lost
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
