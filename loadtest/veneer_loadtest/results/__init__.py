"""Result files: what each command measures, as it stands in JSON.

``docs/loadtest-result.schema.json`` is made from these classes.
"""

from veneer_loadtest.results.facts import FORMAT
from veneer_loadtest.results.files import Result, read_result, write_result
from veneer_loadtest.results.load import (
    AdapterLoad,
    Distribution,
    FindMaxResult,
    GeneratorFigures,
    Level,
    Probe,
    Requests,
    Residency,
    RunResult,
    ServerCounts,
    SloFigures,
    SloLimits,
    Split,
    Timeline,
    Totals,
)
from veneer_loadtest.results.swap import Case, CaseFigures, ChurnFigures, Spread, SwapResult

__all__ = [
    "FORMAT",
    "AdapterLoad",
    "Case",
    "CaseFigures",
    "ChurnFigures",
    "Distribution",
    "FindMaxResult",
    "GeneratorFigures",
    "Level",
    "Probe",
    "Requests",
    "Residency",
    "Result",
    "RunResult",
    "ServerCounts",
    "SloFigures",
    "SloLimits",
    "Split",
    "Spread",
    "SwapResult",
    "Timeline",
    "Totals",
    "read_result",
    "write_result",
]
