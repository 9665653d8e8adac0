"""The adapters of a load: adapters that the server has, folders, or synthetic ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from veneer_loadtest import setup, workload
from veneer_loadtest.errors import BadOption
from veneer_loadtest.load.spec import Traced
from veneer_loadtest.load.trace import read_trace

_SYNTHETIC: int = 8
_TELL_EVERY: int = 100


@dataclass(frozen=True, slots=True)
class AdapterOptions:
    """Options that choose the adapters: names on the server, folders, or synthetic ones.

    Attributes:
        first: numbers N; each is a level on the first N of ``names`` or of the folders. Empty:
            one level on all of them.
        generate: number of synthetic adapters, by level; empty: 8 if nothing else is given.
        ranks: ranks of the synthetic adapters, in turn.
        targets: projections that synthetic adapters adapt.
        keep: published adapters are not deleted at the end.
    """

    names: Sequence[str] = ()
    folder: Path | None = None
    first: Sequence[int] = ()
    generate: Sequence[int] = ()
    ranks: Sequence[int] = (16,)
    targets: Sequence[str] = workload.PROJECTIONS
    keep: bool = False
    seed: int = 1

    def check(self, *, openai: bool, traced: bool) -> None:
        """Raise `BadOption` for options that cannot be combined."""
        given = bool(self.names) + (self.folder is not None) + bool(self.generate)
        if given > 1:
            raise BadOption("give one of --names, --adapters and --generate")
        if openai and given and not self.names:
            raise BadOption(
                "adapters can be pushed to a Veneer server only (--spawn or --server): load "
                "them on the other server yourself, and name them with --names a,b"
            )
        if traced and (self.generate or self.first):
            raise BadOption("a trace names its own adapters: leave out --generate and --first")
        if self.first and not (self.names or self.folder):
            raise BadOption(
                "--first goes with --names and --adapters; --generate takes several numbers"
            )

    def synthetic(self, *, traced: bool) -> bool:
        """Return whether the adapters are synthetic, made for the served base."""
        return self.folder is None and not self.names and not traced

    def levels(self, names: tuple[str, ...]) -> Sequence[tuple[str, ...]]:
        """Return the names of each level; ``("",)`` is the base.

        Raises:
            BadOption: a number in ``first`` is larger than the number of adapters.
        """
        if self.first and max(self.first) > len(names):
            raise BadOption(f"--first {max(self.first)}: there are {len(names)} adapters")
        return [names[:count] or ("",) for count in self.first] or [names]


def names_of(adapters: AdapterOptions, traced: Traced | None) -> tuple[str, ...]:
    """Return the adapters of the trace, or else the given names; ``""`` is the base."""
    if traced is not None:
        return tuple(sorted({line.adapter for line in read_trace(Path(traced.path))}))
    return tuple(adapters.names) or ("",)


def chosen(
    adapters: AdapterOptions,
    traced: Traced | None,
    shape: workload.BaseSizes | None,
    scratch: Path,
    tell: Callable[[str], None],
) -> tuple[Mapping[str, Path] | Iterable[tuple[str, Path]], Sequence[tuple[str, ...]]]:
    """Return the adapters to publish, and the names of each level.

    Args:
        shape: sizes of the base for synthetic adapters; None if the adapters are not synthetic.
        scratch: a folder for synthetic adapters.
        tell: called with progress messages.
    """
    if adapters.folder is not None:
        found = setup.find_adapters(adapters.folder)
        return found, adapters.levels(names_of(adapters, traced) if traced else tuple(found))
    if not adapters.synthetic(traced=traced is not None):
        return {}, adapters.levels(names_of(adapters, traced))
    assert shape is not None
    counts = tuple(adapters.generate) or (_SYNTHETIC,)
    names = tuple(map(workload.adapter_name, range(max(counts))))
    made = _made(adapters, names, shape, scratch, tell)
    return made, [names[:count] or ("",) for count in counts]


def _made(
    adapters: AdapterOptions,
    names: Sequence[str],
    shape: workload.BaseSizes,
    scratch: Path,
    tell: Callable[[str], None],
) -> Iterator[tuple[str, Path]]:
    """Make synthetic adapters, and remove each when the next one is requested: the server keeps
    its own copy, and thousands of adapters would need the disk space twice."""
    for number, name in enumerate(names):
        folder = workload.make_adapter(
            scratch / name,
            shape,
            rank=adapters.ranks[number % len(adapters.ranks)],
            seed=workload.adapter_seed(adapters.seed, number),
            targets=adapters.targets,
        )
        yield name, folder
        shutil.rmtree(folder)
        if (number + 1) % _TELL_EVERY == 0:
            tell(f"{number + 1} of {len(names)} adapters made and pushed")
