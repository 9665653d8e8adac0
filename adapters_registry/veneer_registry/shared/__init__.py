"""A catalog in PostgreSQL and a store of objects, which several registries may share.

`locations` opens both. `catalog` keeps the catalog, with a local copy for reading (`mirror`);
`object_store` keeps the content, with a local cache (`cache`). `postgres` and `objects` are the
two connections, and turn their errors into ours.
"""
