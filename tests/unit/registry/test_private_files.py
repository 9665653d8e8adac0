"""What Veneer creates in a data folder is private to its user, whatever the umask."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from veneer_registry.errors import InvalidField
from veneer_registry.registry import Registry

from tests.unit.registry.kit import BASE, make_adapter, push

PLAY = """
import os, sys
from contextlib import suppress
from pathlib import Path
os.umask(int(sys.argv[1], 8))
from tests.unit.registry.kit import BASE, announce, bundle_files, make_adapter, make_older, push
from veneer_registry import rebuild, upkeep
from veneer_registry.bundle_files import TEMPLATE_FILE
from veneer_registry.registry import Registry
from veneer_registry.weights import WEIGHTS_FILE

data, scratch = Path(sys.argv[2]), Path(sys.argv[3])
folders = [make_adapter(scratch / f"{n}", seed=n) for n in range(4)]
(folders[1] / TEMPLATE_FILE).write_text("{{ messages }}")
with Registry.open(data, BASE) as registry:
    for number, folder in enumerate(folders):
        push(registry, f"name-{number}", folder)
make_older(data / "catalog.sqlite", 3)  # made by this test: its mode is a user's
with Registry.open(data, BASE) as registry:
    push(registry, "name-0", folders[1], allow_replace=True)
    registry.update("name-1", labels={"a": "b"})
    registry.quarantine(registry.resolve("name-2").weights_digest, "rot")
    lease = registry.acquire("name-3")
    registry.delete("name-3")
with Registry.open(data, BASE) as registry:
    assert list((data / "store" / "quarantine" / "unnamed").iterdir())
(data / "catalog.sqlite").write_bytes(b"junk")
rebuild.recover(data)
registry = Registry.open(data, BASE)
push(registry, "last", folders[3])
upload = registry.begin_upload(announce("new", bundle_files(folders[2])))
upload.write(WEIGHTS_FILE, 0, b"x" * 100)
with registry.begin_upload(announce("new", bundle_files(folders[2]))):
    for path in (data, *data.rglob("*")):
        print(oct(path.lstat().st_mode & 0o777), int(path.is_dir()), path.relative_to(data))
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("umask", ["000", "022", "077"])
def test_modes_whatever_the_umask(tmp_path: Path, umask: str) -> None:
    data, scratch = tmp_path / "deep" / "data", tmp_path / "scratch"
    done = subprocess.run(
        [sys.executable, "-c", PLAY, umask, str(data), str(scratch)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    wrong = [f"{mode} {name}" for mode, folder, name in lines if mode != _mode(folder == "1")]
    assert wrong == []
    seen = {Path(name).name for *_, name in lines}
    assert {"catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm", "LOCK"} <= seen
    assert {"catalog.sqlite.v3", "id", "changes", "bundle.json"} <= seen
    assert any(name.startswith("catalog.sqlite.before-recovery") for name in seen)
    assert len([name for *_, name in lines if "uploads/" in name]) > 1
    assert len([name for *_, name in lines if "staging/" in name]) > 1


def _mode(folder: bool) -> str:
    return "0o700" if folder else "0o600"


def test_an_older_folder_is_closed_to_others(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with Registry.open(data, BASE) as registry:
        push(registry, "chat", make_adapter(tmp_path / "a"))
    for path in (data, *data.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    with Registry.open(data, BASE) as registry:
        registry.acquire("chat").release()
        push(registry, "more", make_adapter(tmp_path / "b", seed=2))
        for path in (data, data / "store", data / "store" / "weights"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
        for path in (*data.glob("catalog.sqlite*"), data / "LOCK"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


CHILD = """
import os, sys
from pathlib import Path
from tests.unit.registry.kit import BASE
from veneer_registry.errors import VeneerError
from veneer_registry.registry import Registry
os.setgid(12345)
os.setuid(12345)
try:
    Registry.open(Path(sys.argv[1]), BASE)
except VeneerError as error:
    print(error.reason, error.message)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("strange", ["folder", "catalog"])
def test_another_users_folder_is_refused(strange: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        os.chmod(scratch, 0o755)
        data = Path(scratch) / "data"
        Registry.open(data, BASE).close()
        for path in (data, *data.rglob("*")):
            os.chown(path, 12345, 12345)
        os.chown(data if strange == "folder" else data / "catalog.sqlite", 0, 0)
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(data)],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[3],
        )
    assert done.stdout.startswith("INVALID_FIELD"), done.stderr
    assert "--data-dir" in done.stdout or "chown" in done.stdout


def test_a_folder_that_cannot_be_trusted_names_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, for those who are not root: only the user's number is a fake."""
    data = tmp_path / "data"
    Registry.open(data, BASE).close()
    monkeypatch.setattr(os, "geteuid", lambda: data.stat().st_uid + 1)
    with pytest.raises(InvalidField) as caught:
        Registry.open(data, BASE)
    assert caught.value.metadata["owner"] == str(data.stat().st_uid)
