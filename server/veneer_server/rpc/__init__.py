"""The gRPC services; protobuf goes no further than this package."""
