"""Each .proto says where its code belongs in other languages: without `go_package`,
protoc-gen-go makes nothing."""

from __future__ import annotations

import importlib

import pytest
from google.protobuf.descriptor_pb2 import FileOptions

from tests.places import REPOSITORY

PROTOS = sorted(path.stem for path in (REPOSITORY / "proto").rglob("*.proto"))


def expected(name: str) -> FileOptions:
    """What buf's managed mode sets by its rules, except `go_package`, which has none."""
    return FileOptions(
        csharp_namespace="Veneer.V1",
        go_package="veneer/v1;veneerv1",
        java_multiple_files=True,
        java_outer_classname=f"{name.title()}Proto",
        java_package="com.veneer.v1",
        objc_class_prefix="VXX",
        php_metadata_namespace=r"Veneer\V1\GPBMetadata",
        php_namespace=r"Veneer\V1",
        ruby_package="Veneer::V1",
    )


def test_all_protos_are_found() -> None:
    assert {"adapters", "inference", "server"} <= set(PROTOS)


@pytest.mark.parametrize("name", PROTOS)
def test_a_file_has_the_options_of_every_language(name: str) -> None:
    """Of the generated code: it shows too whether that is up to date."""
    made = importlib.import_module(f"veneer_proto.v1.{name}_pb2")
    found = FileOptions()
    found.CopyFrom(made.DESCRIPTOR.GetOptions())
    assert found == expected(name)
