"""Writes the wheel's bill of materials (SBOM) beside it, as CycloneDX JSON: ``make wheel``.

It lists our packages, the native library's sources with their digests, and every package that
the wheel or one of its extras needs. Versions are those installed in this environment, with
which the tests ran; packages that pyproject.toml names also have the range that it allows. A
package that only an extra needs has the scope "optional". Nothing in the output depends on the
time or the folder, so that the same wheel in the same environment gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tomllib
import uuid
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement

ROOT: Final = Path(__file__).resolve().parents[1]
NATIVE: Final = "server/veneer_server/backends/native/cpp"
OURS: Final = "Apache-2.0"
EXTRAS: Final = (
    "",
    "server",
    "gateway",
    "train",
    "loadtest",
    "tracing",
    "remote",
    "scale",
    "cuda",
)
"""The extras that are listed; "" is the base install. Left out, as this environment lacks them:
deepspeed, which transformers imports wherever it is installed, and ray, which is 240 MB."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="sbom.py", description=__doc__)
    parser.add_argument("wheel", type=Path, nargs="+")
    for wheel in parser.parse_args().wheel:
        out = wheel.with_suffix(".cdx.json")
        out.write_text(build(wheel), "utf-8")
        print(out)
    return 0


def build(wheel: Path) -> str:
    """The bill of materials as JSON text."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"sha256:{digest}"))
    # The library's default is the current time, which would differ from build to build.
    bom.metadata.timestamp = None  # type: ignore[assignment]
    bom.metadata.properties.add(
        Property(name="veneer:resolved", value="as installed where the wheel was built")
    )
    veneer = bom.metadata.component = _veneer(project, wheel.name, digest)
    packages = dict(_packages(project["project"]))
    for name, (component, _) in sorted(packages.items()):
        bom.components.add(component)
        bom.register_dependency(component, [packages[n][0] for n in sorted(packages[name][1])])
    direct = {_plain(r.name) for _, r in _direct(project["project"])}
    native = _native()
    bom.components.add(native)
    bom.register_dependency(veneer, [packages[n][0] for n in sorted(direct & set(packages))])
    bom.register_dependency(veneer, [native])
    return str(JsonV1Dot6(bom).output_as_string(indent=1)) + "\n"


def _veneer(project: dict[str, Any], wheel: str, digest: str) -> Component:
    """The wheel, with the packages in it."""
    name, version = project["project"]["name"], project["project"]["version"]
    folders = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    return Component(
        name=name,
        version=version,
        type=ComponentType.LIBRARY,
        bom_ref=name,
        purl=PackageURL("pypi", name=name, version=version, qualifiers={"file_name": wheel}),
        description=project["project"]["description"],
        licenses=[LicenseFactory().make_with_expression(project["project"]["license"])],
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
        components=[
            Component(
                name=folder.rpartition("/")[2],
                version=version,
                type=ComponentType.LIBRARY,
                bom_ref=f"{name}/{folder.rpartition('/')[2]}",
                licenses=[LicenseFactory().make_with_expression(OURS)],
            )
            for folder in folders
        ],
    )


def _native() -> Component:
    """The library of kernels, which the wheel contains compiled and as sources."""
    files = sorted(p for p in (ROOT / NATIVE).rglob("*") if p.suffix in (".cpp", ".h"))
    return Component(
        name="veneer-native",
        type=ComponentType.LIBRARY,
        bom_ref="veneer-native",
        description="kernels in C++, compiled from these files",
        licenses=[LicenseFactory().make_with_expression(OURS)],
        components=[
            Component(
                name=str(file.relative_to(ROOT / NATIVE)),
                type=ComponentType.FILE,
                bom_ref=f"veneer-native/{file.relative_to(ROOT / NATIVE)}",
                hashes=[
                    HashType(
                        alg=HashAlgorithm.SHA_256,
                        content=hashlib.sha256(file.read_bytes()).hexdigest(),
                    )
                ],
            )
            for file in files
        ],
    )


def _direct(project: dict[str, Any]) -> Iterator[tuple[str, Requirement]]:
    """Extra and requirement of each package that pyproject.toml names."""
    for extra in EXTRAS:
        named = project["optional-dependencies"][extra] if extra else project["dependencies"]
        for text in named:
            yield extra, Requirement(text)


def _packages(project: dict[str, Any]) -> Iterator[tuple[str, tuple[Component, set[str]]]]:
    """Every needed package that is installed: name -> component, names that it needs."""
    ranges: dict[str, set[str]] = {}
    extras: dict[str, set[str]] = {}
    queue = list(_direct(project))
    for extra, wanted in queue:
        ranges.setdefault(_plain(wanted.name), set()).add(str(wanted.specifier))
        extras.setdefault(_plain(wanted.name), set()).add(extra)
    todo = [(wanted.name, tuple(wanted.extras)) for _, wanted in queue]
    needed: dict[str, set[str]] = {}
    while todo:
        name, asked = todo.pop()
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            sys.exit(f"sbom: {name} is not installed here: run `make install` first")
        own = needed.get(_plain(name))
        if own is not None and not asked:
            continue
        after = {
            (_plain(r.name), tuple(sorted(r.extras)))
            for r in map(Requirement, found.requires or ())
            if r.marker is None
            or any(r.marker.evaluate({"extra": each}) for each in ("", *asked))
        }
        new = after - {(n, ()) for n in own or ()}
        needed.setdefault(_plain(name), set()).update(n for n, _ in after)
        todo += [each for each in sorted(new) if each[0] not in needed or each[1]]
    base = [name for name, of in extras.items() if "" in of]
    for name in base:  # and everything that those need
        base += sorted(needed[name] - set(base))
    for name in sorted(needed):
        scope = ComponentScope.REQUIRED if name in base else ComponentScope.OPTIONAL
        yield (
            name,
            (_component(name, scope, ranges.get(name), extras.get(name)), needed[name]),
        )


def _component(
    name: str, scope: ComponentScope, ranges: set[str] | None, extras: set[str] | None
) -> Component:
    found = metadata.distribution(name)
    properties = [Property(name="veneer:range", value=each) for each in sorted(ranges or ())]
    properties += [
        Property(name="veneer:extra", value=each or "(base install)")
        for each in sorted(extras or ())
    ]
    return Component(
        name=name,
        version=found.version,
        type=ComponentType.LIBRARY,
        bom_ref=f"{name}=={found.version}",
        purl=PackageURL("pypi", name=name, version=found.version),
        scope=scope,
        licenses=_licences(found.metadata),
        properties=properties,
    )


def _licences(told: Any) -> Iterable[Any]:
    """The licences in a package's metadata: an expression, else classifiers, else a name."""
    factory = LicenseFactory()
    if expression := told.get("License-Expression"):
        return [factory.make_from_string(expression)]
    named = [
        each.rpartition(" :: ")[2]
        for each in told.get_all("Classifier") or ()
        if each.startswith("License :: ") and each != "License :: OSI Approved"
    ]
    if named:
        return [DisjunctiveLicense(name=each) for each in sorted(set(named))]
    text = (told.get("License") or "").strip()
    # Some packages put the whole licence text there.
    return [factory.make_from_string(text)] if text and "\n" not in text else []


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    raise SystemExit(main())
