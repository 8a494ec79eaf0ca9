"""buf over our protos, which lie flat in protos/ while buf wants them in ostro/v1.

Run at a release (`make released-protos`), this writes protos/released.binpb: the descriptors of
what clients are out there with, which every later change is held against.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROTOS = Path(__file__).resolve().parents[2] / "protos"
RELEASED = PROTOS / "released.binpb"


def lay_out(directory: Path) -> Path:
    """Copy our protos into `directory` as buf wants them; gives the folder of the files."""
    package = directory / "ostro" / "v1"
    package.mkdir(parents=True)
    for path in PROTOS.glob("*.proto"):
        shutil.copy(path, package)
    shutil.copy(PROTOS / "buf.yaml", directory)
    return package


def buf(directory: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run buf in a folder that `lay_out` has filled."""
    return subprocess.run(
        [Path(sys.executable).with_name("buf"), *arguments],
        cwd=directory,
        env={"HOME": str(directory), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def write_released(target: Path) -> None:
    """Write the descriptors of our protos as they are now."""
    with tempfile.TemporaryDirectory() as scratch:
        lay_out(Path(scratch))
        form = ("--as-file-descriptor-set", "--exclude-source-info")
        buf(Path(scratch), "build", *form, "--output", target).check_returncode()


if __name__ == "__main__":
    write_released(RELEASED)
