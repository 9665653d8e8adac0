"""The Dockerfile's steps without Docker: ``make image-replay``. As root, on Debian.

Executes its RUN, COPY, ENV, ARG, WORKDIR and USER steps in roots made by debootstrap. Then it
starts the server as its user with a read-only root, a volume and a noexec /tmp, and sends
requests as a new user would. First it prints how this differs from Docker.
"""

from __future__ import annotations

import argparse
import os
import platform
import runpy
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pip._internal.models.index import PyPI

from tests.packaging.dockerfile import Stage, Step, parse
from tests.packaging.stranger import (
    Failed,
    Installation,
    Login,
    must_say,
    pip_environment,
    stage,
    use,
)

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / ".cache" / "tools"
MIRROR = "http://deb.debian.org/debian"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}"
LIB = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}"
LIBRARIES = "libssl3t64,libffi8,libsqlite3-0,libbz2-1.0,liblzma5,zlib1g,libuuid1,libstdc++6"
"""Debian packages that a Python in /usr/local needs."""
SECRETS = "/run/secrets"
"""Where a container's keys and certificates are."""
COMPILERS = ("c++", "g++", "gcc", "cc", "clang", "clang++", "as", "ld")
DIFFERS = """\
differs from Docker:
  base images   Debian {suite} by debootstrap with {python}, for {bases}
  torch         from {torch}
  isolation     chroot and mounts; network, processes and limits are the host's
  ports         free ones of the host
  steps         layers, EXPOSE, VOLUME and STOPSIGNAL are not executed; HEALTHCHECK's command is
                run once the server serves"""


@dataclass
class Image:
    """A root, and the settings of ENV, WORKDIR and USER."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    arguments: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = ""

    def command(self) -> list[str]:
        """The prefix of a command to run inside."""
        user = [f"--userspec={self.user}"] if self.user else []
        chroot = shutil.which("chroot", path=PATH) or "chroot"
        return [chroot, *user, str(self.root), "/usr/bin/env", "-C", self.folder]

    def home(self) -> str:
        """The user's home, from the root's passwd."""
        lines = (self.root / "etc" / "passwd").read_text().splitlines()
        fields = [line.split(":") for line in lines]
        return next((f[5] for f in fields if f[2] == (self.user or "0")), "/")


def mount(*words: str | Path) -> None:
    """Mount in this process's mount namespace."""
    subprocess.run(["mount", *map(str, words)], check=True)


def debootstrap(suite: str, to: Path, *, debians: bool) -> None:
    """A small Debian with Python, venv and certificates, like python:slim: Debian's Python, or
    this process's in /usr/local, as in those images."""
    program = TOOLS / "usr" / "sbin" / "debootstrap"
    scripts = {"DEBOOTSTRAP_DIR": str(TOOLS / "usr" / "share" / "debootstrap"), "PATH": PATH}
    packages = "--include=ca-certificates," + ("python3,python3-venv" if debians else LIBRARIES)
    done = subprocess.run(
        [program, "--variant=minbase", packages, suite, to, MIRROR],
        env=scripts,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Failed(f"debootstrap: {(done.stdout + done.stderr)[-2000:]}")
    local = to / "usr" / "local"
    if debians:
        (local / "bin" / "python").symlink_to("/usr/bin/python3")
        return
    leave = shutil.ignore_patterns("site-packages", "test", "__pycache__", "*.a")
    shutil.copytree(sys.base_prefix, local, symlinks=True, ignore=leave, dirs_exist_ok=True)
    (local / LIB / "site-packages").mkdir()
    # libpython is in /usr/local/lib, which the loader finds by its cache.
    subprocess.run(["chroot", to, "/sbin/ldconfig"], check=True, env={"PATH": PATH})
    subprocess.run(["chroot", to, "python", "--version"], check=True, env={"PATH": PATH})


def open_root(base: Path, to: Path) -> Image:
    """A copy of the base in which commands can run and reach packages as on the host."""
    subprocess.run(["cp", "-a", "--reflink=auto", base, to], check=True)
    mount("--bind", to, to)
    mount("-t", "proc", "proc", to / "proc")
    mount("-t", "tmpfs", "tmpfs", to / "dev")
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        (to / "dev" / name).touch()
        mount("--bind", f"/dev/{name}", to / "dev" / name)
    (to / "dev" / "fd").symlink_to("/proc/self/fd")
    (to / "dev" / "shm").mkdir()
    mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", to / "dev" / "shm")
    shutil.copyfile("/etc/resolv.conf", to / "etc" / "resolv.conf")
    shutil.copyfile("/etc/hosts", to / "etc" / "hosts")
    # Folders sort before the files in them, which then need no separate mount.
    words = (word for value in pip_environment().values() for word in value.split())
    for given in sorted(set(words)):
        path, inside = Path(given), to / given.lstrip("/")
        if not (path.is_absolute() and path.exists()):
            continue
        if inside.exists() and inside.samefile(path):
            continue
        (inside if path.is_dir() else inside.parent).mkdir(parents=True, exist_ok=True)
        if path.is_file():
            inside.touch()
        mount("--bind", path, inside)
        mount("-o", "remount,bind,ro", inside)
    return Image(to)


def build(
    image: Image, steps: list[Step], given: Mapping[str, str], others: dict[str, Image]
) -> None:
    """Execute a stage's steps."""
    for step in steps:
        if step.kind == "RUN":
            _run(image, step.text)
        elif step.kind == "COPY":
            _copy(image, step, others)
        elif step.kind == "ARG":
            image.arguments |= {name: given.get(name, value) for name, value in step.pairs}
        elif step.kind == "ENV":
            for name, value in step.pairs:
                image.environment[name] = value.replace("$PATH", image.environment["PATH"])
        elif step.kind == "WORKDIR":
            image.folder = step.text
            (image.root / step.text[1:]).mkdir(parents=True, exist_ok=True)
        elif step.kind == "USER":
            image.user = step.text
        elif step.kind not in ("EXPOSE", "VOLUME", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT"):
            raise Failed(f"{step.kind} is not replayed: teach tests/packaging/replay.py to")


def _run(image: Image, command: str) -> None:
    print(f"   RUN {command[:110]}", flush=True)
    began = time.monotonic()
    done = subprocess.run(
        [*image.command(), "/bin/sh", "-c", command],
        env={**pip_environment(), **image.environment, **image.arguments, "HOME": image.home()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Failed(
            f"RUN {command}: status {done.returncode}: {(done.stdout + done.stderr)[-3000:]}"
        )
    print(f"       {time.monotonic() - began:.0f} s", flush=True)


def _copy(image: Image, step: Step, others: dict[str, Image]) -> None:
    """Copy files, owned by root as with COPY."""
    words = step.words
    source = ROOT
    if words[0].startswith("--from="):
        source = others[words.pop(0).removeprefix("--from=")].root
    *names, to = words
    target = image.root / to[1:] if to.startswith("/") else image.root / image.folder[1:] / to
    for name in names:
        found = source / name.lstrip("/")
        if not found.is_dir():
            shutil.copy(found, target)
        elif source == ROOT:
            shutil.copytree(found, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            subprocess.run(["cp", "-a", found, target], check=True)
    if source == ROOT:
        subprocess.run(["chown", "-R", "0:0", target], check=True)


def inspect(image: Image) -> None:
    """Check what must be in the image, and what must not."""
    folder = image.root / "opt" / "veneer"
    found = [name for name in COMPILERS if shutil.which(name, path=_paths(image))]
    if found:
        raise Failed(f"the image has compilers: {found}")
    kernels = sorted(
        each.name.rsplit("-", 2)[0] for each in folder.rglob("native/prebuilt/*.so")
    )
    # By its file: this runs without the project's environment.
    forms = runpy.run_path(str(ROOT / "server/veneer_server/backends/native/forms.py"))
    wanted = sorted(form.name for form in forms["forms_of"](platform.machine()))
    if kernels != wanted:
        raise Failed(f"the image has the kernels {kernels}, not {wanted}")
    for each in folder.rglob("*"):
        status = each.lstat()
        open_ = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not each.is_symlink()
        if status.st_uid != 0 or open_:
            raise Failed(f"{each} is user {status.st_uid}'s, mode {status.st_mode:o}")
    cuda = sorted(each.name for each in folder.rglob("site-packages/nvidia*"))
    if cuda:
        raise Failed(f"the image has CUDA's packages: {cuda}")
    size = subprocess.run(["du", "-sm", folder], capture_output=True, text=True, check=True)
    print(f"     /opt/veneer: {size.stdout.split()[0]} MB, no compiler, no CUDA, all root's")


def _paths(image: Image) -> str:
    return ":".join(str(image.root / each[1:]) for each in image.environment["PATH"].split(":"))


def serve(image: Image, last: Stage, work: Path) -> None:
    """Serve like ``docker run --read-only --tmpfs /tmp -v veneer:/var/lib/veneer``."""
    (volume,) = last.one("VOLUME").words
    data = work / "volume"
    subprocess.run(["cp", "-a", image.root / volume[1:], data], check=True)
    mount("-o", "remount,bind,ro", image.root)
    mount("--bind", data, image.root / volume[1:])
    mount("-t", "tmpfs", "-o", "mode=1777,noexec,nosuid,nodev", "tmpfs", image.root / "tmp")
    environment = {**pip_environment(), **image.environment, "HOME": image.home()}
    place = Installation(environment, work, tuple(image.command()))
    refused = place.run("sh", "-c", "touch /opt/veneer/x; touch /x; id -u")
    must_say(refused, "cannot touch '/opt/veneer/x'", "cannot touch '/x'", image.user)
    _, _, health = last.one("HEALTHCHECK").text.partition(" CMD ")
    entry = last.one("ENTRYPOINT").words
    must_say(place.run(*entry, status=1), "keys.toml", "`veneer-server key new` creates it")
    with stage("its secrets are made"):
        login = make_secrets(image, place, entry, work / "secrets")
    use(place, entry, work / "server.log", asked=[Step("CMD", health).words], login=login)


def make_secrets(
    image: Image, place: Installation, entry: Sequence[str], volume: Path
) -> Login:
    """The first run of docs/security.md, on a volume; the server then has it read-only."""
    mounted = image.root / SECRETS[1:]
    subprocess.run(["cp", "-a", mounted, volume], check=True)
    mount("--bind", volume, mounted)
    names = ("--name", "localhost", "--name", "veneer")
    place.run(*entry, "tls", "self-signed", *names, "--out", f"{SECRETS}/tls")
    said = place.run(*entry, "key", "new", "--name", "me", "--role", "operator")
    (key,) = [line for line in said.splitlines() if line.startswith("vn_")]
    for each in ("keys.toml", "tls/key.pem"):
        if (volume / each).stat().st_mode & 0o077:
            raise Failed(f"others can read {each}")
    mount("-o", "remount,bind,ro", mounted)
    return Login(key, volume / "tls" / "cert.pem")


def replay(suite: str, work: Path, *, debians: bool) -> None:
    """Replay the whole Dockerfile."""
    stages = parse((ROOT / "Dockerfile").read_text("utf-8"))
    wheels = Path(pip_environment().get("PIP_FIND_LINKS", "/nowhere"))
    own_torch = not debians and any(wheels.glob(f"torch-*{TAG}-*"))
    # pip's usual index, next to the torch that is available here.
    index = pip_environment().get("PIP_INDEX_URL", PyPI.simple_url)
    given = {"TORCH_INDEX": index if own_torch else os.environ.get("TORCH_INDEX", "")}
    torch = (
        "this machine's wheels, as pip is set to take it"
        if own_torch
        else "TORCH_INDEX, as in Docker"
    )
    python = "Debian's Python" if debians else f"this machine's Python {sys.version.split()[0]}"
    bases = ", ".join(sorted({each.base for each in stages}))
    print(DIFFERS.format(suite=suite, bases=bases, torch=torch, python=python), flush=True)
    with stage(f"debootstrap {suite}"):
        debootstrap(suite, work / "base", debians=debians)
    images: dict[str, Image] = {}
    for number, each in enumerate(stages):
        with stage(f"stage {each.name or number}"):
            image = images[each.name] = open_root(work / "base", work / f"stage-{number}")
            build(image, each.steps, given, images)
    inspect(image)
    serve(image, stages[-1], work)


def main() -> int:
    """See the module docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.packaging.replay", description=__doc__
    )
    parser.add_argument("--suite", default="trixie", help="of Debian")
    parser.add_argument(
        "--debians-python",
        action="store_true",
        help="Debian's Python, and torch from TORCH_INDEX, in place of this machine's",
    )
    parser.add_argument(
        "--if-possible",
        action="store_true",
        help="exit with 0 where this machine allows no mounts",
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        # Private mounts and processes, which end with this process.
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation=private"]
        if why := _impossible(own):
            print(f"image-replay: CANNOT RUN here, nothing was checked: {why}", file=sys.stderr)
            return 0 if options.if_possible else 1
        again = [sys.executable, "-m", "tests.packaging.replay", "--inside", *sys.argv[1:]]
        return subprocess.run([*own, *again], cwd=ROOT, check=False).returncode
    os.umask(0o022)
    began = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="veneer-image-"))
    try:
        replay(options.suite, work, debians=options.debians_python)
    except (Failed, subprocess.CalledProcessError) as error:
        print(f"image-replay: {error}", file=sys.stderr)
        return 1
    finally:
        _remove(work)
    print(f"the image is sound; {time.monotonic() - began:.0f} s")
    return 0


def _impossible(own: list[str]) -> str:
    """Why we cannot have private mounts; "" if we can."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            command = [*own, "mount", "-t", "tmpfs", "tmpfs", folder]
            tried = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return tried.stderr.strip() if tried.returncode else ""


def _remove(work: Path) -> None:
    """Unmount first, since bind-mounted files belong to the host."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for each in reversed(mounts):
        if each.startswith(f"{work}/"):
            subprocess.run(["umount", "--lazy", each], check=False)
    left = Path("/proc/self/mounts").read_text()
    if f" {work}/" not in left:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(main())
