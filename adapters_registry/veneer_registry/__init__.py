"""The adapter registry: format, store and catalog. No torch, no gRPC."""
