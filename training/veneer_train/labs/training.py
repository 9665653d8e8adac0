"""Labs that train: QLoRA against LoRA and full fine-tuning, ranks, optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from matplotlib.figure import Figure

from veneer_train.config import parse_config
from veneer_train.labs.one_run import LabResult, run
from veneer_train.labs.output import Lab, Row
from veneer_train.model import training_device
from veneer_train.plan import Method, plan, read_shape
from veneer_train.recipes import build
from veneer_train.strict import overlay

_SHORT: Final = (
    "One small model and a few dozen steps of one data set: what holds here for thousands of "
    "steps, or for models with billions of parameters, needs a larger run (--config)."
)

FULL_LR: Final = 5e-5
METHODS: Final[tuple[Method, ...]] = ("qlora", "lora", "full")

DEFAULTS: Final[Mapping[str, Any]] = {
    "lora": {"r": 16, "alpha": 32},
    "data": {"max_len": 320, "on_truncated": "drop"},
    "train": {"lr": 5e-4, "batch": 4, "accum": 1, "steps": 40},
    "eval": {"every": 0},
    "output": {"save_every": 0},
}
"""Settings that --config and --set override."""


class Runs:
    """Builds the data once, and runs training on it.

    Args:
        base: folder of the base.
        out: the lab's folder; data and logs go to its ``runs``.
        over: sections that override `DEFAULTS`.
    """

    def __init__(
        self,
        base: Path,
        out: Path,
        over: Mapping[str, Any],
        *,
        seed: int,
        threads: int,
        told: Callable[[str], None],
    ) -> None:
        self.base, self.seed = base, seed
        self._out, self._over, self._threads, self._told = out / "runs", over, threads, told
        self._data: dict[str, str] = {}
        if "train" not in over.get("data", {}):
            data = self._out / "sql"
            build("sql", data, seed)
            self._data = {"train": str(data / "train.jsonl"), "val": str(data / "val.jsonl")}

    def config(self, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The config of one run, as sections."""
        own = {
            "model": {"path": str(self.base), "name": self.base.name},
            "train": {"seed": self.seed},
            "output": {
                "dir": str(self._out / name / "adapter"),
                "logs": str(self._out / name / "logs"),
            },
        }
        raw = overlay(overlay({"data": self._data}, DEFAULTS), self._over)
        raw = overlay(overlay(raw, changes), own)
        parse_config(raw)  # refuses bad settings before the first run
        return raw

    def run(self, name: str, changes: Mapping[str, Any], method: Method = "qlora") -> LabResult:
        """Do one run."""
        self._told(f"{name}: training")
        config = self.config(name, changes)
        return run(config, method, self._out / name, threads=self._threads)

    def given(self, section: str, key: str) -> bool:
        """Whether --config or --set gives this setting."""
        return key in self._over.get(section, {})

    @property
    def setting(self) -> dict[str, Any]:
        config = parse_config(self.config("-", {}))
        train = config.train
        return {
            "base": self.base.name,
            "data": Path(config.data.train).parent.name,
            "steps": train.steps,
            "batch": f"{train.batch} x {train.accum}",
            "lr": train.lr,
            "threads": self._threads,
        }


def _row(first: Mapping[str, Any], found: LabResult) -> dict[str, Any]:
    return {
        **first,
        "trained, M": round(found.trained / 1e6, 3),
        "val loss": found.val_loss,
        "val accuracy, %": 100 * found.val_accuracy,
        "peak, MB": round(found.peak_bytes / 1e6),
        "tokens/s": round(found.tokens_per_s, 1),
    }


def _bars(rows: Sequence[Row], label: str, columns: Sequence[str]) -> Figure:
    figure = Figure(figsize=(3.2 * len(columns), 3.4), layout="constrained")
    for axis, column in zip(figure.subplots(1, len(columns)), columns, strict=True):
        axis.bar([str(r[label]) for r in rows], [r[column] for r in rows], color="#2563eb")
        axis.set_title(column, fontsize=10)
        axis.tick_params(axis="x", labelrotation=30, labelsize=8)
        axis.grid(axis="y", alpha=0.3)
    return figure


def qlora_vs_lora(runs: Runs, methods: Sequence[Method] = METHODS, *, command: str) -> Lab:
    """The same run with an adapter on a 4-bit base, with one on a 16-bit base, and with all
    weights trained."""
    shape = read_shape(runs.base)
    rows: list[Row] = []
    for method in methods:
        # Unless given, use a lower learning rate for a whole model than for an adapter.
        smaller = method == "full" and not runs.given("train", "lr")
        changes = {"train": {"lr": FULL_LR}} if smaller else {}
        found = runs.run(method, changes, method)
        # Plan for the longest of these samples, since their lengths are known.
        longest = overlay(changes, {"data": {"max_len": found.longest}})
        config = parse_config(runs.config(method, longest))
        where: Literal["cpu", "cuda"] = "cuda" if training_device().type == "cuda" else "cpu"
        planned = plan(shape, config, method=method, device=where).total
        rows.append(
            {
                **_row({"method": method, "base loss": found.base_loss}, found),
                "lr": config.train.lr,
                "planned, MB": round(planned / 1e6),
                "plan / peak": round(planned / found.peak_bytes, 3),
            }
        )
    by_method = {r["method"]: r for r in rows}
    says = []
    if (qlora := by_method.get("qlora")) is not None:
        says.append(f"The base's loss is {qlora['base loss']:.4f} (4 bits)")
        if (lora := by_method.get("lora")) is not None:
            apart = qlora["val loss"] - lora["val loss"]
            says[0] += f"; after training QLoRA's is {apart:+.4f} from LoRA's"
        says[0] += "."
    return Lab(
        name="qlora-vs-lora",
        title="QLoRA beside LoRA and full fine-tuning",
        question=(
            "What does training over a 4-bit base cost in quality, and what does it save? The "
            "same samples in the same order, by each method."
        ),
        rows=rows,
        plot=_bars(rows, "method", ("val loss", "peak, MB", "tokens/s")),
        says=[
            *says,
            "`veneer-train plan` computes the planned column before anything is loaded, for "
            f"`data.max_len={found.longest}`, the longest sample's tokens.",
        ],
        limits=[
            _SHORT,
            "On a CPU nothing is paged, and 4-bit weights are dequantized for each matrix "
            "multiply, which costs time that a GPU's kernels do not take.",
            "Of this small base a third are embeddings, which stay in 16 bits, and the "
            "libraries take more than the weights: at 65B the same sum gives 49 GB "
            "against 784 (`veneer-train plan --llama-65b --preset paper --device cuda`).",
        ],
        command=command,
        seed=runs.seed,
        setting=runs.setting,
    )


def rank(runs: Runs, ranks: Sequence[int], *, command: str) -> Lab:
    """Ranks from small to large, with alpha in proportion."""
    rows: list[Row] = []
    for r in ranks:
        found = runs.run(f"r{r}", {"lora": {"r": r, "alpha": 2 * r}})
        rows.append(_row({"rank": r}, found))
    best = min(rows, key=lambda row: row["val loss"])
    return Lab(
        name="rank",
        title="Ranks",
        question="Does a larger adapter learn more in the same steps?",
        rows=rows,
        plot=_bars(rows, "rank", ("val loss", "peak, MB", "tokens/s")),
        says=[f"The lowest validation loss is rank {best['rank']}'s, {best['val loss']:.4f}."],
        limits=[
            _SHORT,
            "One learning rate for all ranks: with alpha in proportion to the rank a larger "
            "one takes larger steps, which is part of what is seen.",
        ],
        command=command,
        seed=runs.seed,
        setting=runs.setting,
    )


def usual_optimizers() -> str:
    """The optimizers that the lab compares by default, separated by commas."""
    names = "adamw_torch_fused,adamw_8bit"
    if training_device().type == "cuda":
        names += ",paged_adamw_8bit,paged_adamw_32bit"
    return names


def optimizers(runs: Runs, names: Sequence[str], *, command: str) -> Lab:
    """The same run with several optimizers."""
    rows: list[Row] = []
    for name in names:
        rows.append(_row({"optimizer": name}, runs.run(name, {"train": {"optim": name}})))
    return Lab(
        name="optimizers",
        title="Optimizers",
        question="What do 8-bit and paged optimizers cost, and what do they save?",
        rows=rows,
        plot=_bars(rows, "optimizer", ("val loss", "peak, MB", "tokens/s")),
        says=[
            f"Against {rows[0]['optimizer']}: "
            + "; ".join(
                f"{r['optimizer']} {r['val loss'] - rows[0]['val loss']:+.4f} in loss, "
                f"{r['tokens/s'] / rows[0]['tokens/s']:.2f} times the tokens/s"
                for r in rows[1:]
            )
            + "."
        ],
        limits=[
            _SHORT,
            "Paged optimizers need a GPU, and are left out without one.",
            "An adapter's state is small: what 8 bits save shows in full fine-tuning.",
        ],
        command=command,
        seed=runs.seed,
        setting=runs.setting,
    )
