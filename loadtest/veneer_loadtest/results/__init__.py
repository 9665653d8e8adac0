"""Result files: the JSON that each command writes.

``docs/loadtest-result.schema.json`` is generated from these classes.
"""

from veneer_loadtest.results.compare import (
    AnswersGate,
    CompareLevel,
    CompareResult,
    Ends,
    FigureRange,
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
    RequestSplit,
    RunResult,
    ServerCounts,
    SloFigures,
    SloLimits,
    TierShares,
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
    "FigureRange",
    "FindMaxResult",
    "GeneratorFigures",
    "Level",
    "LoadResult",
    "Probe",
    "Ratio",
    "ReferenceGate",
    "RequestSplit",
    "Requests",
    "Result",
    "RoundFigures",
    "RunResult",
    "ServerCounts",
    "SloFigures",
    "SloLimits",
    "Spread",
    "SwapResult",
    "SystemFacts",
    "SystemFigures",
    "TierShares",
    "Timeline",
    "Totals",
    "read_result",
    "write_result",
]
