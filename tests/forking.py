"""Python processes that start at once: each is forked from one that has imported what takes seconds to import.

``python forking.py SOCKET serve`` imports and then forks on request; ``python forking.py SOCKET -c CODE ...`` and
``... -m MODULE ...`` stand for ``python -c`` and ``python -m``: same input and output, folder, environment and exit
code. What FiftyOne reads from the environment when it is imported (where its database is) is the server's.
"""

import array
import atexit
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import contextmanager, redirect_stdout

_IMPORTS = ("fiftyone", "open_clip", "fiftyone_ecif.cli.main", "fiftyone_ecif.api.influence", "fiftyone_ecif.demo.demo")
_FILES = array.array("i", range(3))


@contextmanager
def forked_python(folder, **environment):
    """Starts the server; the command that stands for ``python``."""
    command = [sys.executable, __file__, str(folder / "forks.sock")]
    server = subprocess.Popen(
        [*command, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )
    for line in server.stdout:
        if line == "ready\n":
            break
    try:
        yield [command[0], "-IS", *command[1:]]
    finally:
        server.stdin.close()
        server.wait()
        server.stdout.close()


def _ask(path, arguments):
    """Has a process forked; its exit code."""
    order = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [b"files"], list(_FILES))
        with server.makefile("rw") as lines:
            lines.write(json.dumps(order) + "\n")
            lines.flush()
            return int(lines.readline())


def _serve(path):
    """Imports, and returns in each forked process with what it is to do."""
    with redirect_stdout(open(2, "w", buffering=1, closefd=False)):  # where FiftyOne's log then goes, as in the shell
        for name in _IMPORTS:
            importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those below
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(64)
        print("ready", flush=True)
        while sys.stdin not in (ready := select.select([server, sys.stdin], [], [])[0]):
            connection, _ = ready[0].accept()
            if os.fork() == 0:
                server.close()
                return _process(connection)
            connection.close()
    os._exit(0)


def _process(connection):
    """Waits for the process that it forks and passes its exit code on; returns in that process only."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, _, _ = socket.recv_fds(connection, len(b"files"), len(_FILES))
    with connection.makefile("rw") as lines:
        order = json.loads(lines.readline())
        process = os.fork()
        if process:
            for file in (*files, *_FILES):
                os.close(file)
            _, status = os.waitpid(process, 0)
            lines.write(f"{os.waitstatus_to_exitcode(status)}\n")
            lines.flush()
            os._exit(0)
    connection.close()
    for file, number in zip(files, _FILES, strict=True):
        os.dup2(file, number)
        os.close(file)
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    return order["arguments"]


def _run(option, what, *arguments):
    """Runs code or a module; the exit code."""
    sys.path[0] = ""
    sys.argv = [what if option == "-m" else option, *arguments]
    try:
        if option == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main():
    path, *arguments = sys.argv[1:]
    if arguments != ["serve"]:
        return _ask(path, arguments)
    code = _run(*_serve(path))
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # freeing what was imported, object by object, would take seconds


if __name__ == "__main__":
    sys.exit(main())
