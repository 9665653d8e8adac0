"""Where the catalog and the content of each tenant are: its data folder, or elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from veneer_registry.errors import FailedPrecondition
from veneer_registry.opening import FolderPlaces, Places

from veneer_server.serving.tenants import FOLDER

__all__ = ["PlacesConfig", "places_of"]


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
    try:
        from veneer_registry.shared.objects import Objects
        from veneer_registry.shared.places import SharedPlaces
        from veneer_registry.shared.postgres import Address
    except ModuleNotFoundError as error:
        raise FailedPrecondition(
            f"--store and --catalog need the package {error.name}: pip install 'veneer[scale]'",
            metadata={"extra": "scale"},
        ) from error
    default = folder == config.data_dir
    url, schema = config.store.rstrip("/"), "veneer"
    if not default:
        url, schema = f"{url}/{FOLDER}/{folder.name}", f"{schema}/{folder.name}"
    address = Address(config.catalog, config.catalog_password_file, schema)
    return SharedPlaces(folder, address, Objects(url), cache_bytes=config.store_cache_bytes)
