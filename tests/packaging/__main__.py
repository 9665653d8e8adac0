"""The wheel, from nothing: ``make wheel-check``.

Builds the wheel, has auditwheel list the symbol versions that it needs and compare them with
its tag, installs it into a new environment with a new home and no compiler, and does what a new
user would: follows the programs' hints about extras, starts the server with the bundled base,
waits for it, publishes an example adapter and gets answers. Then it builds the wheel for ARM,
and looks into it. Exit status 1 if anything fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
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
AUDITWHEEL = "auditwheel>=6.8,<7"
PLATFORM = "manylinux_2_28"
"""As README names the wheel: this imports nothing of Veneer's, which is not installed."""


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
    if not wheel.name.endswith(f"-py3-none-{PLATFORM}_x86_64.whl"):
        raise Failed(f"{wheel.name} is not for {PLATFORM}: `pip wheel --verbose` says why")
    if len(kernels) != 6 or len(adapters) != 3:
        raise Failed(f"the wheel has the kernels {kernels} and the adapters {adapters}")
    return wheel


def install_auditwheel(folder: Path) -> dict[str, str]:
    """The environment in which `audit` finds it, in a folder of its own."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    subprocess.run([*pip, AUDITWHEEL], check=True)
    return {**os.environ, "PYTHONPATH": str(folder)}


def audit(wheel: Path, environment: dict[str, str]) -> None:
    """Print each symbol version that a wheel needs, as auditwheel finds them, and check that
    the systems of its tag have them.

    Raises:
        Failed: the tag promises too much.
    """
    command = [sys.executable, "-m", "auditwheel", "show", "--json", str(wheel)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    told = json.loads(done.stdout)
    for library, versions in sorted(told["versioned_symbols"].items()):
        print(f"     {library}: {' '.join(versions)}")
    needed = re.match(r"manylinux_2_(\d+)_", told["overall_tag"])
    tag = re.search(r"-manylinux_2_(\d+)_\w+\.whl$", wheel.name)
    if needed is None or tag is None or int(needed[1]) > int(tag[1]):
        raise Failed(f"{wheel.name} is a wheel for {told['overall_tag']}, by auditwheel")
    print(f"     auditwheel: {told['overall_tag']}, so the wheel's tag holds")


def must_be_refused(wheel: Path, folder: Path, environment: dict[str, str]) -> None:
    """Check that `audit` refuses the wheel with the tag of older systems."""
    older = folder / wheel.name.replace(PLATFORM, "manylinux_2_17")
    shutil.copy(wheel, older)
    try:
        audit(older, environment)
    except Failed as said:
        print(f"     refused with another tag: {said}")
    else:
        raise Failed(f"auditwheel lets {older.name} pass")


def check_arm(out: Path, auditor: dict[str, str]) -> None:
    """Build the wheel for ARM, and check what its libraries are for, need and export."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    environment = {**os.environ, "CXX": str(tools.CXX)}
    subprocess.run([*pip, "--wheel-dir", str(out), str(ROOT)], check=True, env=environment)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        names = [name for name in files.namelist() if "/native/prebuilt/" in name]
        forms = sorted(Path(name).name.rsplit("-", 2)[0] for name in names)
        named = wheel.name.endswith(f"-py3-none-{PLATFORM}_aarch64.whl")
        if not named or forms != ["neon", "neon-bf16"]:
            raise Failed(f"{wheel.name} has the kernels {forms}")
        program, variables = tools.readelf()
        for name in names:
            command = [*program, "-h", "--dyn-syms", files.extract(name, out)]
            done = subprocess.run(
                command, env=variables, check=True, capture_output=True, text=True
            )
            if "AArch64" not in done.stdout or "veneer_step" not in done.stdout:
                raise Failed(f"{name} is no library of kernels for ARM")
    print(f"     {wheel.name}")
    audit(wheel, auditor)


def install(wheel: Path, folder: Path, cache: str) -> Installation:
    """A new environment with the wheel, and an empty home. A compiler is not in its PATH."""
    venv.create(folder / "venv", with_pip=True)
    home = folder / "home"
    home.mkdir()
    pip = folder / "venv" / "bin" / "pip"
    environment = {
        **pip_environment(),
        # pip's own cache, so that a second run downloads little.
        "PIP_CACHE_DIR": cache,
        "HOME": str(home),
        "PATH": str(pip.parent),
    }
    subprocess.run([pip, "install", "--quiet", str(wheel)], check=True, env=environment)
    return Installation(environment, home)


def check_client(place: Installation) -> None:
    """Check the base install: a client that says how to install missing extras."""
    must_say(place.run("veneer", "--version"), "veneer 0.")
    must_say(place.run("veneer-train", "--version", status=1), "pip install ", "[train]'")
    must_say(place.run("veneer", "example", "chat"), "veneer adapter push chat --name chat")


def follow(place: Installation, extra: str, *words: str) -> None:
    """Run a command that lacks an extra, and what it says to install.

    Raises:
        Failed: it says no command, or one that fails.
    """
    said = place.run(*words, status=1)
    hint = re.search(rf"pip install '[^']+\[{extra}\]'", said)
    if hint is None:
        raise Failed(f"{' '.join(words)} does not say how to install {extra}: {said}")
    with stage(hint[0]):
        # However long: torch is large.
        if place.popen([*shlex.split(hint[0]), "--quiet"]).wait():
            raise Failed(f"{hint[0]} failed")


def check_server(place: Installation, log: Path) -> None:
    """Check the server, by the steps of README."""
    must_say(place.run("veneer-server", "--version"), "veneer 0.")
    use(place, ["veneer-server"], log)
    doctor = place.run("veneer-server", "doctor")
    native = next(line for line in doctor.splitlines() if "native kernels" in line)
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
        for name in ("wheel", "pure", "auditwheel", "older", "home", "arm"):
            (folder / name).mkdir()
        try:
            with stage("build the wheel"):
                wheel = build(folder / "wheel")
            with stage("build it without a compiler"):
                build(folder / "pure", compiler=False)
            with stage(f"pip install {AUDITWHEEL}"):
                auditor = install_auditwheel(folder / "auditwheel")
            with stage("the symbols that it needs"):
                audit(wheel, auditor)
                must_be_refused(wheel, folder / "older", auditor)
            with stage(f"pip install {wheel.name}"):
                place = install(wheel, folder / "home", cache)
            with stage("the client"):
                check_client(place)
            follow(place, "server", "veneer-server")
            # A port that is not listened on: the gateway is looked for first.
            follow(place, "gateway", "veneer-server", "--openai-listen", "127.0.0.1:0")
            check_server(place, folder / "server.log")
            if said := tools.missing():
                if os.environ.get("CI"):
                    raise Failed(said)
                print(f"the wheel for ARM is NOT CHECKED: {said}")
            else:
                with stage("build the wheel for ARM"):
                    check_arm(folder / "arm", auditor)
        except (Failed, subprocess.CalledProcessError) as error:
            print(f"wheel-check: {error}", file=sys.stderr)
            return 1
    print(f"the wheel is sound; {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
