"""The wheel, from nothing: ``make wheel-check``.

Builds the wheel, installs it into new environments with a new home, hides every compiler, and
does what a new user would: starts the server with the bundled base, waits for it, publishes an
example adapter and gets answers. Then it builds the wheel for ARM, and looks into it. Exit
status 1 if anything fails.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

from tests.arm import tools
from tests.packaging.stranger import Failed, Installation, must_say, pip_environment, stage, use

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ("veneer_labs", "veneer_peers")
"""Packages of the repository that are installed beside the wheel."""


def build(out: Path, *, compiler: bool = True) -> Path:
    """Build the wheel, with kernels and adapters; without a compiler, a pure one."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    environment = dict(os.environ) if compiler else {**os.environ, "CXX": "/nowhere/c++"}
    subprocess.run([*pip, "--wheel-dir", str(out), str(ROOT)], check=True, env=environment)
    (wheel,) = out.glob("*.whl")
    print(f"     {wheel.name}, {wheel.stat().st_size / 1e6:.0f} MB")
    if not compiler:
        if "py3-none-any" not in wheel.name:
            raise Failed("a wheel that is built without a compiler is not pure")
        return wheel
    names = zipfile.ZipFile(wheel).namelist()
    kernels = [
        name for name in names if name.startswith("veneer_server/backends/native/prebuilt/")
    ]
    adapters = [name for name in names if name.endswith("adapter_model.safetensors")]
    beside = [name for name in names if name.startswith(BESIDE) or "recipes" in name]
    if beside:
        raise Failed(f"these belong to packages of their own, yet the wheel has them: {beside}")
    if "linux_x86_64" not in wheel.name or len(kernels) != 3 or len(adapters) != 3:
        raise Failed(f"the wheel has the kernels {kernels} and the adapters {adapters}")
    return wheel


LIBRARIES = {
    "libstdc++.so.6",
    "libm.so.6",
    "libgcc_s.so.1",
    "libc.so.6",
    "ld-linux-aarch64.so.1",
}
"""That a library for ARM may need: manylinux has them."""


def check_arm(out: Path) -> None:
    """Build the wheel for ARM, and check what its libraries are for, need and export."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    environment = {**os.environ, "CXX": str(tools.CXX)}
    subprocess.run([*pip, "--wheel-dir", str(out), str(ROOT)], check=True, env=environment)
    (wheel,) = out.glob("*.whl")
    tag = re.search(r"-py3-none-manylinux_2_(\d+)_aarch64\.whl$", wheel.name)
    with zipfile.ZipFile(wheel) as files:
        names = [name for name in files.namelist() if "/native/prebuilt/" in name]
        forms = sorted(Path(name).name.rsplit("-", 2)[0] for name in names)
        if tag is None or forms != ["neon", "neon-bf16"]:
            raise Failed(f"{wheel.name} has the kernels {forms}")
        program, variables = tools.readelf()
        for name in names:
            command = [*program, "-h", "-d", "-V", "--dyn-syms", files.extract(name, out)]
            done = subprocess.run(
                command, env=variables, check=True, capture_output=True, text=True
            )
            glibc = max(int(number) for number in re.findall(r"GLIBC_2\.(\d+)", done.stdout))
            needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", done.stdout))
            if "AArch64" not in done.stdout or "veneer_step" not in done.stdout:
                raise Failed(f"{name} is no library of kernels for ARM")
            if glibc > int(tag[1]) or not needed <= LIBRARIES:
                raise Failed(f"{name} needs glibc 2.{glibc} and {needed}")
    print(f"     {wheel.name}: glibc 2.{glibc}")


def install(wheel: Path, extras: str, folder: Path, cache: str) -> Installation:
    """A new environment with the wheel, and an empty home."""
    venv.create(folder / "venv", with_pip=True)
    home = folder / "home"
    home.mkdir()
    pip = folder / "venv" / "bin" / "pip"
    environment = {
        **pip_environment(),
        # pip's own cache, so that a second run downloads little.
        "PIP_CACHE_DIR": cache,
        "HOME": str(home),
        # Contains no compiler.
        "PATH": str(pip.parent),
    }
    subprocess.run([pip, "install", "--quiet", f"{wheel}{extras}"], check=True, env=environment)
    return Installation(environment, home)


def check_client(place: Installation) -> None:
    """Check the base install: a client that names missing extras."""
    must_say(place.run("veneer", "--version"), "veneer 0.")
    must_say(place.run("veneer-server", status=1), "pip install 'veneer[server]'")
    must_say(place.run("veneer-train", "--version", status=1), "pip install 'veneer[train]'")
    must_say(place.run("veneer", "example", "chat"), "veneer adapter push chat --name chat")


def check_server(place: Installation, log: Path) -> None:
    """Check the server, by the steps of README."""
    must_say(place.run("veneer-server", "--version"), "veneer 0.")
    use(place, ["veneer-server"], log)
    doctor = place.run("veneer-server", "doctor")
    native = next(line for line in doctor.splitlines() if "native step" in line)
    must_say(native, "ok ", "prebuilt, and runs here", "apt install g++")


def main() -> int:
    """See the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.packaging", description=__doc__)
    parser.parse_args()
    began = time.monotonic()
    ask = [sys.executable, "-m", "pip", "cache", "dir"]
    found = subprocess.run(ask, capture_output=True, text=True, check=False)
    with tempfile.TemporaryDirectory(prefix="veneer-wheel-") as work:
        folder = Path(work)
        cache = found.stdout.strip() or str(folder / "pip")
        for name in ("wheel", "pure", "client", "server", "arm"):
            (folder / name).mkdir()
        try:
            with stage("build the wheel"):
                wheel = build(folder / "wheel")
            with stage("build it without a compiler"):
                build(folder / "pure", compiler=False)
            with stage("pip install veneer"):
                client = install(wheel, "", folder / "client", cache)
            with stage("the client"):
                check_client(client)
            with stage("pip install 'veneer[server,gateway]'"):
                server = install(wheel, "[server,gateway]", folder / "server", cache)
            check_server(server, folder / "server.log")
            if said := tools.missing():
                if os.environ.get("CI"):
                    raise Failed(said)
                print(f"the wheel for ARM is NOT CHECKED: {said}")
            else:
                with stage("build the wheel for ARM"):
                    check_arm(folder / "arm")
        except (Failed, subprocess.CalledProcessError) as error:
            print(f"wheel-check: {error}", file=sys.stderr)
            return 1
    print(f"the wheel is sound; {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
