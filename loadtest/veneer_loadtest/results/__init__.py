"""Result files: what each command measures, as JSON.

``docs/loadtest-result.schema.json`` is made from these classes.
"""

from veneer_loadtest.results.compare import (
    AnswersGate,
    CompareLevel,
    CompareResult,
    Ends,
    Range,
    Ratio,
    ReferenceGate,
    RoundFigures,
    SystemFacts,
    SystemFigures,
)
from veneer_loadtest.results.facts import FORMAT
from veneer_loadtest.results.files import LoadResult, Result, read_result, write_result
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
from veneer_loadtest.results.swap import (
    Case,
    CaseFigures,
    ChurnBy,
    ChurnFigures,
    Spread,
    SwapResult,
)

__all__ = [
    "FORMAT",
    "AdapterLoad",
    "AnswersGate",
    "Case",
    "CaseFigures",
    "ChurnBy",
    "ChurnFigures",
    "CompareLevel",
    "CompareResult",
    "Distribution",
    "Ends",
    "FindMaxResult",
    "GeneratorFigures",
    "Level",
    "LoadResult",
    "Probe",
    "Range",
    "Ratio",
    "ReferenceGate",
    "Requests",
    "Residency",
    "Result",
    "RoundFigures",
    "RunResult",
    "ServerCounts",
    "SloFigures",
    "SloLimits",
    "Split",
    "Spread",
    "SwapResult",
    "SystemFacts",
    "SystemFigures",
    "Timeline",
    "Totals",
    "read_result",
    "write_result",
]
