"""Where the catalog and the content of each tenant are: its data folder, or elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from veneer_registry.errors import FailedPrecondition
from veneer_registry.extras import install_extra
from veneer_registry.opening import FolderPlaces, Places

from veneer_server.access.principal import DEFAULT_TENANT
from veneer_server.serving.tenants import FOLDER

if TYPE_CHECKING:
    from veneer_registry.shared.objects import Objects
    from veneer_registry.shared.postgres import Address

__all__ = ["PlacesConfig", "address_of", "objects_of", "places_of"]


class PlacesConfig(Protocol):
    """The settings that decide it."""

    @property
    def data_dir(self) -> Path:
        """Folder of the default tenant."""

    @property
    def store(self) -> str:
        """``s3://bucket/prefix``, or ""."""

    @property
    def catalog(self) -> str:
        """``postgresql://...``, or ""."""

    @property
    def catalog_password_file(self) -> Path | None:
        """File with the database's password."""

    @property
    def store_cache_bytes(self) -> int:
        """Most bytes of weights from an object store on the local disk, for each tenant."""


def places_of(config: PlacesConfig, folder: Path) -> Places:
    """The places of the tenant whose folder this is. Connects to nothing.

    Another tenant than the default one has a prefix below ``tenants/``, and a schema with its
    name in the same database.

    Raises:
        InvalidField: an address cannot be one.
        FailedPrecondition: a package is not installed.
    """
    if not config.store:
        return FolderPlaces(folder)
    with _needs_packages():
        from veneer_registry.shared.places import SharedPlaces
    tenant = DEFAULT_TENANT if folder == config.data_dir else folder.name
    address, objects = address_of(config, tenant), objects_of(config.store, tenant)
    return SharedPlaces(folder, address, objects, cache_bytes=config.store_cache_bytes)


def address_of(config: PlacesConfig, tenant: str) -> Address:
    """Of a tenant's catalog in PostgreSQL. Raises as `places_of`."""
    with _needs_packages():
        from veneer_registry.shared.postgres import Address
    schema = "veneer" if tenant == DEFAULT_TENANT else f"veneer/{tenant}"
    return Address(config.catalog, config.catalog_password_file, schema)


def objects_of(store: str, tenant: str) -> Objects:
    """A tenant's objects below ``s3://bucket/prefix``. Connects to nothing. Raises as
    `places_of`."""
    with _needs_packages():
        from veneer_registry.shared.objects import Objects
    url = store.rstrip("/")
    return Objects(url if tenant == DEFAULT_TENANT else f"{url}/{FOLDER}/{tenant}")


@contextmanager
def _needs_packages() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise FailedPrecondition(
            f"--store and --catalog need the package {error.name}: {install_extra('scale')}",
            metadata={"extra": "scale"},
        ) from error
