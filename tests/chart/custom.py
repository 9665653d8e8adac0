"""Schemas of the kinds that Kubernetes itself does not have, as far as the chart uses them.

Written from the definitions of the Prometheus operator (monitoring.coreos.com/v1) and of the
Gateway API Inference Extension (inference.networking.k8s.io/v1). Unknown fields are errors.
"""

from __future__ import annotations

from typing import Any


def _object(required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": properties,
    }


_TEXT = {"type": "string", "minLength": 1}
_LABELS = {"type": "object", "additionalProperties": {"type": "string", "maxLength": 63}}
_METADATA = _object("name namespace labels", name=_TEXT, namespace=_TEXT, labels=_LABELS)
_PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
_SECRET_KEY = _object("name key", name=_TEXT, key=_TEXT)
_OF_SECRET = _object("secret", secret=_SECRET_KEY)
_EXPRESSION = _object(
    "key operator",
    key=_TEXT,
    operator={"enum": ["In", "NotIn", "Exists", "DoesNotExist"]},
    values={"type": "array", "items": _TEXT},
)

_MONITOR = _object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "monitoring.coreos.com/v1"},
    kind={"const": "ServiceMonitor"},
    metadata=_METADATA,
    spec=_object(
        "selector endpoints",
        selector=_object(
            "matchLabels",
            matchLabels=_LABELS,
            matchExpressions={"type": "array", "items": _EXPRESSION},
        ),
        endpoints={
            "type": "array",
            "minItems": 1,
            "items": _object(
                "port",
                port=_TEXT,
                path=_TEXT,
                interval={"type": "string", "pattern": r"^[0-9]+(ms|s|m|h)$"},
                scheme={"enum": ["http", "https"]},
                authorization=_object("credentials", type=_TEXT, credentials=_SECRET_KEY),
                tlsConfig=_object(
                    "", ca=_OF_SECRET, cert=_OF_SECRET, keySecret=_SECRET_KEY, serverName=_TEXT
                ),
            ),
        },
    ),
)

_POOL = _object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "inference.networking.k8s.io/v1"},
    kind={"const": "InferencePool"},
    metadata=_METADATA,
    spec=_object(
        "selector targetPorts endpointPickerRef",
        selector=_object("matchLabels", matchLabels=_LABELS),
        targetPorts={
            "type": "array",
            "minItems": 1,
            "maxItems": 8,
            "items": _object("number", number=_PORT),
        },
        endpointPickerRef=_object(
            "name port",
            group={"type": "string"},
            kind=_TEXT,
            name=_TEXT,
            port=_object("number", number=_PORT),
            failureMode={"enum": ["FailOpen", "FailClose"]},
        ),
    ),
)

SCHEMAS: dict[str, dict[str, Any]] = {
    "monitoring.coreos.com/v1": _MONITOR,
    "inference.networking.k8s.io/v1": _POOL,
}
"""By apiVersion; each has one kind here."""
